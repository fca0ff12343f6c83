"""The rows of one file, by its format: what every command that reads people's files reads them by.

A row is a text, or an object with fields. Rows come in the file's order, each with its place for
messages, and reading can begin behind a number of them, as a resumed preparation does.
"""

import argparse
import codecs
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from sedd_scale.errors import DataError
from sedd_scale.files.compressed import decompressed, plain_name
from sedd_scale.preparation.archives import archive_rows
from sedd_scale.preparation.rows import (
    ARCHIVES,
    FORMATS,
    Columns,
    ReadText,
    Row,
    format_by_name,
    is_file,
    not_utf8_column,
)

PIECE_CHARACTERS = 2_000
LONGEST_PIECE_CHARACTERS = 20_000
READ_BYTES = 1 << 20
PARQUET_ROWS = 256
HEAD_BYTES = 512

_TABLES = (".csv", ".tsv", ".xlsx", ".arrow", ".feather", ".h5", ".hdf5", ".npy", ".npz", ".pdf")
FORMAT_HELP = (
    "text (.txt, .md, .tokens, .raw or any other name), .jsonl, .json, .parquet, .tar (webdataset) "
    "and .zip, each also .gz, .xz, .zst or .bz2"
)

_LIKE_JSON = re.compile(rb'\s*(?:\[\s*)?\{\s*"[^"\n]{0,99}"\s*:')
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """The options of a command that reads people's files."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="what the files are, whatever they are called (each by its first bytes or its name)",
    )
    parser.add_argument(
        "--members",
        metavar="SUFFIX",
        help="of .tar and .zip, only members whose names end so, such as .txt (text and JSON)",
    )


def check_name(path: Path, given: str | None) -> None:
    """Raise DataError where a file cannot be read whatever it holds.

    Args:
        given: its format, where that was said.
    """
    if path.is_dir():
        raise DataError(f"input {path} is a directory: give a glob such as {path}/*.txt")
    if not path.is_file():
        raise DataError(
            f"input {path} is no file that can be read twice, as a pipe cannot: save it to a file"
        )
    if path.stat().st_size == 0:
        raise DataError(f"input {path} is empty: remove it or give a file with text")
    suffix = Path(plain_name(path.name)[0]).suffix
    if given is None and suffix in _TABLES:
        raise DataError(
            f"input {path} has no format that is read: convert it to .jsonl or .parquet, or give "
            "--format text to take it as it stands"
        )
    if path.name.startswith("._"):
        raise DataError(f"input {path} is macOS metadata of another file: leave it out")


def format_of(path: Path, given: str | None = None) -> str:
    """The format of a file: `given`, or by its first bytes, or by its name."""
    if given is not None:
        return given
    with path.open("rb") as raw:
        stream, _ = decompressed(raw, str(path))
        return _format(stream, str(path))


def _format(stream: io.BufferedReader, where: str) -> str:
    head = stream.peek(HEAD_BYTES)
    if head[257:262] == b"ustar":
        return "tar"
    for format, magic in (("parquet", b"PAR1"), ("zip", b"PK\3\4")):
        if head.startswith(magic):
            return format
    named = format_by_name(Path(where).name)
    if named is None and _LIKE_JSON.match(head.removeprefix(codecs.BOM_UTF8)):
        raise DataError(
            f"{where} may be text or JSON: say which with --format text, jsonl (an object per "
            "line) or json (an array)"
        )
    return named or "text"


def read_rows(
    raw: BinaryIO,
    where: str,
    *,
    field: str | None,
    given: str | None = None,
    members: str | None = None,
    in_pieces: bool = False,
    after: tuple[int, int] = (0, 0),
) -> Iterator[Row]:
    """The rows of an open file.

    Args:
        where: its name.
        field: the one field of objects that is wanted; None: all.
        given: the format, one of `FORMATS`; None: by the first bytes, or the name.
        members: of an archive, only those whose name ends in this; None: text and JSON.
        in_pieces: cut a text into several documents.
        after: rows (their number and offset) to go on behind.

    Raises:
        DataError: the file is damaged or its format is not read.
    """
    stream, kind = decompressed(raw, where)
    skip, offset = after
    format = given or _format(stream, where)
    if format == "jsonl":
        rows = _json_lines(stream, where, *((skip, offset) if offset and not kind else (0, 0)))
    elif format == "json":
        rows = _json_entries(stream, where)
    elif format == "parquet":
        rows = _parquet_rows(stream, where, field, skip)
    elif format in ARCHIVES:
        rows = archive_rows(stream, where, format, field, members, read_rows)
    elif in_pieces:
        rows = _pieces(stream, where)
    else:
        rows = iter([Row(where, 1, lambda: _text(stream.read(), where))])
    for row in rows:
        if row.number > skip:
            yield row


def open_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of objects, such as prompts; a name that says no format holds JSON lines.

    Raises:
        DataError: the file is missing or cannot be read; from `value`, a row is no object.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: give a JSONL file")
    check_name(path, None)
    named = format_by_name(path.name)
    with path.open("rb") as raw:
        given = "jsonl" if named in (None, "text") else None
        yield from read_rows(raw, str(path), field=None, given=given)


def _text(content: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 with LF line ends of the bytes that begin at byte `offset` of the decompressed file."""
    text = _decode(content, where, offset)
    if "\r" not in text:
        return text
    return ReadText(text.replace("\r\n", "\n").replace("\r", "\n"))


def _decode(content: bytes, where: str, offset: int) -> str:
    if content.startswith(codecs.BOM_UTF8):
        content, offset = content[len(codecs.BOM_UTF8) :], offset + len(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, offset + error.start, content[error.start], content) from error


def _not_utf8(where: str, offset: int, byte: int, content: bytes) -> DataError:
    packed = plain_name(re.sub(r":\d+$", "", where))[1]
    of_what = "of the decompressed text " if packed else ""
    is_16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    example = "iconv -f UTF-16 -t UTF-8" if is_16 else "iconv -f ISO-8859-1 -t UTF-8"
    return DataError(
        f"{where}: byte 0x{byte:02x} at offset {offset} {of_what}is not UTF-8: convert the file "
        f"to UTF-8 (for example with {example})"
    )


def _json_lines(
    stream: io.BufferedReader, where: str, number: int = 0, offset: int = 0
) -> Iterator[Row]:
    """Lines that are not blank; `offset` is where line `number` ends."""
    if offset:
        stream.seek(offset)
    while line := stream.readline():
        begin = offset
        number += 1
        offset += len(line)
        if line.strip():
            place = f"{where}:{number}"
            yield Row(place, number, partial(_line_object, line, place, begin), offset)


def _line_object(line: bytes, where: str, offset: int) -> dict[str, Any]:
    try:
        row = json.loads(_decode(line, where, offset))
    except (ValueError, RecursionError) as error:
        hint = ""
        if b"\r" in line.strip():
            hint = "; lines that end in CR alone become lines with tr '\\r' '\\n'"
        raise DataError(
            f"{where} is not JSON ({error}): each line must be one object{hint}"
        ) from error
    law = "each line must be one object"
    if isinstance(row, list) and offset == 0:
        law += "; an array of objects is read with the name .json, or with --format json"
    return _object(row, where, law)


def _object(row: Any, where: str, law: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}: {law}")
    return row


def _json_entries(stream: io.BufferedReader, where: str) -> Iterator[Row]:
    """The objects of an array, of lines, or the one that the file is."""
    first = stream.readline()
    while first and not first.removeprefix(codecs.BOM_UTF8).strip():
        first = stream.readline()
    if first.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        try:
            json.loads(first.removeprefix(codecs.BOM_UTF8))
        except ValueError:
            pass
        else:
            rest = io.BufferedReader(cast(Any, _Behind(first, stream)))
            yield from _json_lines(rest, where)
            return
    try:
        whole = json.loads(_decode(first + stream.read(), where, 0))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({error}): give an array of objects, or one object per line"
        ) from error
    for number, entry in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        place = f"{where} (entry {number})"
        value = partial(_object, entry, place, "each entry must be an object")
        yield Row(place, number, value)


class _Behind(io.RawIOBase):
    """A stream with bytes that were read of it put back."""

    def __init__(self, head: bytes, stream: io.BufferedReader) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._head[: len(buffer)] or self._stream.read(len(buffer))
        self._head = self._head[len(content) :]
        buffer[: len(content)] = content
        return len(content)


def _parquet_rows(
    stream: io.BufferedReader, where: str, field: str | None, skip: int
) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{where} needs the package pyarrow: pip install 'sedd_scale[parquet]'"
        ) from error
    source: Any = stream if is_file(stream) else io.BytesIO(stream.read())
    try:
        table = parquet.ParquetFile(source)
        _refuse_several(source, table.metadata, where)
        names = table.schema_arrow.names
        if field is not None and field not in names:
            raise DataError(
                f"{where} has no column {field!r}: name one with --field ({', '.join(names)})"
            )
        columns = names if field is None else [field]
        number = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
                for place in range(len(batch)):
                    number += 1
                    value = partial(_table_row, batch, place, f"{where}:{number}")
                    yield Row(f"{where}:{number}", number, value)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where} is not a whole parquet file ({reason}): replace it") from error


def _table_row(batch: Any, place: int, where: str) -> Columns:
    row = Columns()
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            row[name] = column[place].as_py()
        except UnicodeDecodeError as error:
            raise not_utf8_column(where, name, error) from error
    return row


def _refuse_several(source: BinaryIO, metadata: Any, where: str) -> None:
    """Raise DataError where parquet files stand end to end: the last one's index shows it alone."""
    end = source.seek(-8, io.SEEK_END)
    end -= int.from_bytes(source.read(4), "little")
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            begin = min(chunk.dictionary_page_offset or end, chunk.data_page_offset)
            if begin + chunk.total_compressed_size == end:
                return
    tail = b""
    source.seek(0)
    while content := source.read(READ_BYTES):
        if b"PAR1PAR1" in tail + content:
            raise DataError(f"{where} is several parquet files end to end: give each by itself")
        tail = content[-7:]


def _pieces(stream: io.BufferedReader, where: str) -> Iterator[Row]:
    """Documents of a lone text; never holds more than a piece and a read of it in memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    ends = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    pending = ""
    number = 0
    while True:
        content = stream.read(READ_BYTES)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            position = offset - held + error.start
            head = error.object if position < 2 else b""
            raise _not_utf8(where, position, error.object[error.start], head) from error
        pending += ends.decode(text, final=not content)
        if offset == 0:
            pending = pending.removeprefix("\ufeff")
        offset += len(content)
        changed = ends.newlines not in (None, "\n")
        # A piece is cut only where its longest possible extent has been read, so that the cuts do
        # not depend on the size of a read.
        begin = 0
        while len(pending) - begin > (LONGEST_PIECE_CHARACTERS if content else 0):
            end, following = _piece_end(pending, begin)
            number += 1
            value = partial(ReadText if changed else str, pending[begin:end])
            yield Row(f"{where} (piece {number})", number, value)
            begin = following
        pending = pending[begin:]
        if not content:
            return


def _piece_end(text: str, begin: int) -> tuple[int, int]:
    """Where the piece from `begin` ends, and where the next one begins.

    The first blank line after PIECE_CHARACTERS ends it; failing that within
    LONGEST_PIECE_CHARACTERS, the last line end, or the last space, or the limit itself.
    """
    limit = begin + LONGEST_PIECE_CHARACTERS
    blank = _BLANK_LINES.search(text, begin + PIECE_CHARACTERS, limit)
    if blank is not None:
        return blank.start(), blank.end()
    if len(text) <= limit:
        return len(text), len(text)
    for separator in "\n ":
        last = text.rfind(separator, begin + PIECE_CHARACTERS, limit)
        if last >= 0:
            return last, last + 1
    return limit, limit
