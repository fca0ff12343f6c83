"""The documents of one text file, by its format.

Each function yields (text, where it came from, how many records of the file are behind it, the byte
offset behind it), and can begin behind a number of records, as a resumed preparation does.
"""

import codecs
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from sedd_scale.errors import DataError

PIECE_CHARACTERS = 2_000
LONGEST_PIECE_CHARACTERS = 20_000
READ_BYTES = 1 << 20
PARQUET_ROWS = 256

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")
FORMATS = re.compile(r"\.(?:(txt|jsonl|tar)(\.gz|\.xz|\.zst)?|(parquet))$")
FORMAT_NAMES = ".txt, .jsonl or .tar, plain or with .gz, .xz or .zst, or .parquet"

_Stream = BinaryIO | gzip.GzipFile | lzma.LZMAFile | io.BufferedReader


class Record(NamedTuple):
    """A text, its source for messages, and where the file continues behind it."""

    text: str
    source: str
    records: int
    offset: int


def read_records(
    raw: BinaryIO, path: Path, *, field: str, in_pieces: bool, after: tuple[int, int]
) -> Iterator[Record]:
    """The documents of an open file from behind `after` (records, offset) on.

    Args:
        field: the field or column that holds the text.
        in_pieces: cut a .txt into several documents.
    """
    known = FORMATS.search(path.name)
    assert known is not None
    skipped, offset = after
    if known.group(3) is not None:
        yield from _parquet_rows(raw, path, field, skipped)
        return
    with _decompressed(raw, path) as stream:
        if known.group(1) == "jsonl":
            plain = known.group(2) is None
            yield from _json_lines(stream, path, field, skipped, offset if plain else 0)
        elif known.group(1) == "tar":
            yield from _tar_members(stream, path, field, skipped)
        elif in_pieces:
            for record in _pieces(stream, path):
                if record.records > skipped:
                    yield record
        elif skipped == 0:
            yield Record(_decode(_read(stream, -1, path), path, 0), str(path), 1, 0)


def _decompressed(raw: BinaryIO, path: Path) -> _Stream:
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{path} needs the package zstandard: pip install 'sedd_scale[zstd]'"
            ) from error
        reader: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(_ZstdFile(reader, path))
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    return raw


class _ZstdFile(io.RawIOBase):
    """The library's stream, which reports neither a cut end nor damage as other formats do."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._reader = reader
        self._path = path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        try:
            return int(self._reader.readinto(buffer))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error


def _read(stream: _Stream, size: int, path: Path, *, line: bool = False) -> bytes:
    """Read `size` bytes or a line, naming the file when its compression is damaged."""
    try:
        return stream.readline() if line else stream.read(size)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is cut short or not a {path.suffix} file: replace it") from error


def _decode(content: bytes, path: Path, offset: int) -> str:
    """UTF-8 text of the bytes that begin at byte `offset` of the (decompressed) file."""
    if offset == 0 and content.startswith(codecs.BOM_UTF8):
        content, offset = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, content[error.start]) from error


def _not_utf8(path: Path, offset: int, byte: int) -> DataError:
    of_what = "of the decompressed text " if path.suffix in (".gz", ".xz", ".zst") else ""
    return DataError(
        f"{path}: byte 0x{byte:02x} at offset {offset} {of_what}is not UTF-8: convert the file "
        "to UTF-8 (for example with iconv)"
    )


def _json_lines(
    stream: _Stream, path: Path, field: str, skipped: int, offset: int
) -> Iterator[Record]:
    """`offset` is where line `skipped` ends, 0 where that is not known."""
    if offset:
        stream.seek(offset)
    number = skipped if offset else 0
    while line := _read(stream, 0, path, line=True):
        begin = offset
        number += 1
        offset += len(line)
        if number <= skipped:
            continue
        text = _decode(line, path, begin)
        if not text.strip():
            continue
        yield Record(_field_of(text, field, f"{path}:{number}"), f"{path}:{number}", number, offset)


def _field_of(text: str, field: str, where: str) -> str:
    """The text under a field of one JSON object."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): each line must be one object") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__}: each line must be one object")
    if field not in row:
        available = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where} has no field {field!r}: name one with --field ({available})")
    value = row[field]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {field!r} is a {type(value).__name__}: name a field of text with "
            "--field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} holds half of a surrogate pair at character "
            f"{error.start}: mend the line"
        ) from error
    return value


def _parquet_rows(raw: BinaryIO, path: Path, field: str, skipped: int) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} needs the package pyarrow: pip install 'sedd_scale[parquet]'"
        ) from error
    try:
        table = parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(
                f"{path} has no column {field!r}: name one with --field ({', '.join(names)})"
            )
        number = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= skipped:
                number += rows
                continue
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
                for value in batch.column(0):
                    number += 1
                    if number <= skipped:
                        continue
                    text, where = value.as_py(), f"{path}:{number}"
                    if text is None:
                        continue
                    if not isinstance(text, str):
                        raise DataError(
                            f"{where}: column {field!r} is a {type(text).__name__}: name a column "
                            "of text with --field"
                        )
                    yield Record(text, where, number, 0)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a whole parquet file ({reason}): replace it") from error


class _TailOf:
    """A stream that remembers the last bytes that were read, where a tar has its end mark."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self.tail = (self.tail + content)[-2 * tarfile.BLOCKSIZE :]
        return content


def _tar_members(stream: _Stream, path: Path, field: str, skipped: int) -> Iterator[Record]:
    """The .txt members, and the field of .json members, of a webdataset tar, in their order."""
    number = 0
    whole = _TailOf(stream)
    try:
        with tarfile.open(fileobj=cast(BinaryIO, whole), mode="r|") as archive:
            for member in archive:
                suffix = Path(member.name).suffix
                if not member.isfile() or suffix not in (".txt", ".json"):
                    continue
                number += 1
                if number <= skipped:
                    continue
                content = archive.extractfile(member)
                assert content is not None
                where = f"{path}:{member.name}"
                text = _decode(content.read(), Path(where), 0)
                if suffix == ".json":
                    text = _field_of(text, field, where)
                yield Record(text, where, number, 0)
        while whole.read(READ_BYTES):
            pass
        if any(whole.tail):  # tarfile takes a header that is cut short for the end
            raise EOFError("it has no end mark")
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is cut short or not a tar file ({error}): replace it") from error
    if number == 0:
        raise DataError(f"{path} holds no member that ends in .txt or .json: remove it")


def _pieces(stream: _Stream, path: Path) -> Iterator[Record]:
    """Documents of a lone .txt; never holds more than a piece and a read of it in memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    pending = ""
    number = 0
    while True:
        content = _read(stream, READ_BYTES, path)
        held = len(decoder.getstate()[0])
        try:
            pending += decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            position = offset - held + error.start
            raise _not_utf8(path, position, error.object[error.start]) from error
        if offset == 0:
            pending = pending.removeprefix("\ufeff")
        offset += len(content)
        # A piece is cut only where its longest possible extent has been read, so that the cuts do
        # not depend on the size of a read.
        begin = 0
        while len(pending) - begin > (LONGEST_PIECE_CHARACTERS if content else 0):
            end, following = _piece_end(pending, begin)
            number += 1
            yield Record(pending[begin:end], f"{path} (piece {number})", number, 0)
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
    blank = _BLANK_LINE.search(text, begin + PIECE_CHARACTERS, limit)
    if blank is not None:
        return blank.start(), blank.end()
    if len(text) <= limit:
        return len(text), len(text)
    for separator in "\n ":
        last = text.rfind(separator, begin + PIECE_CHARACTERS, limit)
        if last >= 0:
            return last, last + 1
    return limit, limit
