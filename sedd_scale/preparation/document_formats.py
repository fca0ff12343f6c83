"""The rows of one file, by its format: what every command that reads people's files reads them by.

A row is a text, or an object with fields. Rows come in the file's order, each with its place for
messages, and reading can begin behind a number of them, as a resumed preparation does.
"""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sedd_scale.errors import DataError
from sedd_scale.files.compressed import plain_name

PIECE_CHARACTERS = 2_000
LONGEST_PIECE_CHARACTERS = 20_000
READ_SIZE = 1 << 20  # characters or bytes
PARQUET_ROWS = 256

FORMATS = ("text", "jsonl", "json", "parquet", "tar", "zip")
ARCHIVES = ("tar", "zip")
TEXT_SUFFIXES = (".txt", ".text", ".tokens", ".raw", ".md")
_OF_SUFFIX = {
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jl", ".jsonlines"), "jsonl"),
    ".json": "json",
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **{f".{name}": name for name in ARCHIVES},
}

NULL = "null rows, left out"
BLANK = "blank documents, left out"
HYPHEN = " @-@ "
TOKENISED = (
    f'documents with "{HYPHEN}", as WikiText writes a hyphen; published perplexities are of text '
    "that --detokenizer wikitext of eval_ppl restores"
)
LINE_ENDS = "documents with line ends CRLF or CR, read as LF"

_BINARY = re.compile(rb"[\0-\x06\x0e-\x1a]")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        where: its place, for messages: "FILE:LINE".
        number: rows up to this one; of lines, all of them.
        value: gives what it holds: a text, an object as a dict (`Columns` of a table), or
            `LeftOut`; raises DataError where that is damaged.
        offset: the byte behind it, where reading may go on there; else 0.
    """

    where: str
    number: int
    value: Callable[[], Any]
    offset: int = 0


class Columns(dict[str, Any]):
    """A row of a table, whose missing values are None."""


class LeftOut(str):
    """Why a row gives no document."""


class ReadText(str):
    """A text whose line ends were not all LF before."""


def format_by_name(name: str) -> str | None:
    """The format that a file's name says, or None."""
    return _OF_SUFFIX.get(Path(plain_name(name)[0]).suffix)


def plain_rows(
    stream: io.BufferedReader,
    where: str,
    format: str,
    field: str | None,
    in_pieces: bool = False,
    after: tuple[int, int] = (0, 0),
) -> Iterator[Row]:
    """The rows of a file that is no archive, those of `after` or before it perhaps among them.

    Args:
        stream: its content, not compressed.
        where: its name.
        format: of `FORMATS`.
        field: the one field of objects that is wanted; None: all.
        in_pieces: cut a text into several documents.
        after: of the rows to go on behind, their number and the offset.
    """
    if format == "jsonl":
        return _json_lines(stream, where, *(after if after[1] else (0, 0)))
    if format == "json":
        return _json_entries(stream, where)
    if format == "parquet":
        return _parquet_rows(stream, where, field, after[0])
    if in_pieces:
        return _pieces(stream, where)
    return iter([Row(where, 1, lambda: _text(stream.read(), where))])


def text_of(row: Row, field: str) -> str:
    """The text of a row: `LeftOut`, `ReadText` or any other.

    Raises:
        DataError: it holds no text under the field, or text that is damaged.
    """
    value, where = row.value(), row.where
    if isinstance(value, str):
        return value
    what = "column" if isinstance(value, Columns) else "field"
    if field not in value:
        available = ", ".join(map(str, value)) or "none"
        raise DataError(f"{where} has no {what} {field!r}: name one with --field ({available})")
    found = value[field]
    if found is None:
        return LeftOut(NULL)
    if isinstance(found, bytes):
        try:
            found = found.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8_column(where, field, error) from error
    if not isinstance(found, str):
        raise DataError(
            f"{where}: {what} {field!r} is a {type(found).__name__}: name a {what} of text with "
            "--field"
        )
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} {field!r} holds half of a surrogate pair at character "
            f"{error.start}: mend the line"
        ) from error
    return found


def object_of(row: Row) -> dict[str, Any]:
    """The object of a row; of a table's row what is not null.

    Raises:
        DataError: it is none, or damaged.
    """
    value = row.value()
    if isinstance(value, Columns):
        return {name: entry for name, entry in value.items() if entry is not None}
    if not isinstance(value, dict):
        raise DataError(f"{row.where} is text: each row must be one JSON object")
    return value


def _not_utf8_column(where: str, name: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where}: column {name!r} is not UTF-8 (byte 0x{error.object[error.start]:02x} at "
        f"{error.start}): mend the row"
    )


def seekable(stream: io.BufferedReader) -> Any:
    """The stream if it is a file of the disk, where any place of it can be read; else its bytes."""
    is_file = isinstance(getattr(stream, "raw", None), io.FileIO)
    return stream if is_file else io.BytesIO(stream.read())


def _text(content: bytes, where: str) -> str:
    """UTF-8 with LF line ends."""
    text = _decode(content, where, 0)
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
    coded = "ISO-8859-1"
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        coded = "UTF-32" if content[2:4] == b"\0\0" else "UTF-16"
    remedy = f"convert the file to UTF-8 (for example with iconv -f {coded} -t UTF-8)"
    if coded == "ISO-8859-1" and _BINARY.search(content[:4096]):
        remedy = "it is no text, so leave it out or give the text it was made from"
    return DataError(
        f"{where}: byte 0x{byte:02x} at offset {offset} {of_what}is not UTF-8: {remedy}"
    )


def _json_lines(
    stream: io.BufferedReader, where: str, number: int = 0, offset: int = 0, first: bytes = b""
) -> Iterator[Row]:
    """Lines that are not blank; `offset` is where line `number` ends, `first` was read of it."""
    if offset:
        stream.seek(offset)
    while line := first or stream.readline():
        begin, first = offset, b""
        number += 1
        offset += len(line)
        if line.removeprefix(codecs.BOM_UTF8).strip():
            place = f"{where}:{number}"
            yield Row(place, number, partial(_line_object, line, place, begin), offset)


def _line_object(line: bytes, where: str, offset: int) -> dict[str, Any]:
    law = "each line must be one object"
    if offset == 0 and line.lstrip().startswith(b"["):
        law += "; an array of objects is read with the name .json, or with --format json"
    if b"\r" in line.strip():
        law += "; lines that end in CR alone become lines with tr '\\r' '\\n'"
    try:
        row = json.loads(_decode(line, where, offset))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}): {law}") from error
    return _object(row, where, law)


def _object(row: Any, where: str, law: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}: {law}")
    return row


def _json_entries(stream: io.BufferedReader, where: str) -> Iterator[Row]:
    """The objects of arrays, of lines, or of the file, end to end."""
    number, first = 0, stream.readline()
    while first and not first.removeprefix(codecs.BOM_UTF8).strip():
        number, first = number + 1, stream.readline()
    try:
        is_line = isinstance(json.loads(first.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        is_line = False
    if is_line:
        yield from _json_lines(stream, where, number, first=first)
        return
    text = _decode(first + stream.read(), where, 0).rstrip()
    entries: list[Any] = []
    end = 0
    try:
        while end < len(text) or not entries:
            start = len(text) - len(text[end:].lstrip())
            entry, end = json.JSONDecoder().raw_decode(text, start)
            entries += entry if isinstance(entry, list) else [entry]
            if entry == []:
                break
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({error}): give an array of objects, or one object per line"
        ) from error
    for number, entry in enumerate(entries, start=1):
        place = f"{where} (entry {number})"
        value = partial(_object, entry, place, "each entry must be an object")
        yield Row(place, number, value)


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
    source = seekable(stream)
    _refuse_several(source, where)
    try:
        table = parquet.ParquetFile(source)
        names = table.schema_arrow.names
        if field is not None and field not in names:
            raise DataError(
                f"{where} has no column {field!r}: name one with --field ({', '.join(names)})"
            )
        if field is not None and names.count(field) > 1:
            raise DataError(f"{where} has several columns {field!r}: give each its own name")
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
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{where} is not a whole parquet file ({reason}): replace it") from error


def _table_row(batch: Any, place: int, where: str) -> Columns:
    row = Columns()
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            row[name] = column[place].as_py()
        except UnicodeDecodeError as error:
            raise _not_utf8_column(where, name, error) from error
        except (ValueError, IndexError, OverflowError) as error:
            raise DataError(f"{where}: column {name!r} is damaged ({error}): mend it") from error
    return row


def _refuse_several(source: BinaryIO, where: str) -> None:
    """Raise DataError where parquet files stand end to end: the last one's index shows it alone."""
    tail = b""
    while content := source.read(READ_SIZE):
        if b"PAR1PAR1" in tail + content:
            raise DataError(f"{where} is several parquet files end to end: give each by itself")
        tail = content[-7:]


def _pieces(stream: io.BufferedReader, where: str) -> Iterator[Row]:
    """Documents of a lone text; never holds more than a piece and a read of it in memory."""
    head = stream.peek(4096)[:4096]
    reader = io.TextIOWrapper(stream, "utf-8-sig")
    pending, number, content = "", 0, " "
    while content:
        try:
            content = reader.read(READ_SIZE)
        except UnicodeDecodeError as error:
            position = stream.tell() - len(error.object) + error.start
            raise _not_utf8(where, position, error.object[error.start], head) from error
        pending += content
        changed = reader.newlines not in (None, "\n")
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
