"""Documents out of text files, one at a time, in an order that depends on their names only.

Inputs are globs of .txt, .jsonl and their .gz and .xz, or `builtin:python` (see builtin_text). In a
.jsonl each line is a document, the text under one field. A .txt is one document, with one
exception: when a lone .txt is the whole input, it is cut into documents at blank lines, each of at
least 2,000 characters, so that a single file can give both training and validation text.
"""

import codecs
import glob
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sedd_scale.data.builtin_text import builtin_python_documents
from sedd_scale.errors import DataError

BUILTIN_PYTHON = "builtin:python"
PIECE_CHARACTERS = 2_000
LONGEST_PIECE_CHARACTERS = 20_000
READ_BYTES = 1 << 20

_Stream = BinaryIO | gzip.GzipFile | lzma.LZMAFile

_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")
_FORMATS = re.compile(r"\.(txt|jsonl)(\.gz|\.xz)?$")


class Document(NamedTuple):
    """A text and where it came from ("FILE:LINE" for a line of a .jsonl)."""

    text: str
    source: str


class DocumentStream:
    """The documents of `inputs`; iterating again reads them again, in the same order.

    Args:
        inputs: globs, paths or `builtin:python`.
        field: the field of a .jsonl line that holds the text.

    Raises:
        DataError: a glob matches no file, a file has no known format or is empty; while iterating,
            a byte is not UTF-8, a line is not JSON, a field is missing, or a compressed file is
            damaged.
    """

    def __init__(self, inputs: Sequence[str], *, field: str = "text") -> None:
        self.field = field
        self.builtin = BUILTIN_PYTHON in inputs
        self.files = _expand([pattern for pattern in inputs if pattern != BUILTIN_PYTHON])
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self._finished_bytes = 0
        self._raw: BinaryIO | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes on disk consumed so far, out of `total_bytes`; for a progress bar."""
        return self._finished_bytes + (self._raw.tell() if self._raw is not None else 0)

    def __iter__(self) -> Iterator[Document]:
        self._finished_bytes = 0
        if self.builtin:
            for row in builtin_python_documents():
                yield Document(row["text"], BUILTIN_PYTHON)
        lone_file = len(self.files) == 1 and not self.builtin
        for path in self.files:
            with open(path, "rb") as raw:
                self._raw = raw
                with _decompressed(raw, path) as stream:
                    known = _FORMATS.search(path.name)
                    if known is not None and known.group(1) == "jsonl":
                        yield from _json_lines(stream, path, self.field)
                    elif lone_file:
                        yield from _pieces(stream, path)
                    else:
                        yield Document(_decode(_read(stream, -1, path), path, 0), str(path))
                self._raw = None
            self._finished_bytes += path.stat().st_size


def _expand(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns match, each once, sorted by name within a pattern."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            raise DataError(f"--input {pattern} matches no file: check the path")
        for name in matches:
            path = Path(name)
            if path.is_dir():
                raise DataError(f"--input {name} is a directory: give a glob such as {name}/*.txt")
            if _FORMATS.search(path.name) is None:
                raise DataError(
                    f"--input {name} has no known format: give .txt or .jsonl, plain or with .gz "
                    "or .xz"
                )
            if path.stat().st_size == 0:
                raise DataError(f"--input {name} is empty: remove it or give a file with text")
            files[path] = None
    return list(files)


def _decompressed(raw: BinaryIO, path: Path) -> _Stream:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    return raw


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
    of_what = "of the decompressed text " if path.suffix in (".gz", ".xz") else ""
    return DataError(
        f"{path}: byte 0x{byte:02x} at offset {offset} {of_what}is not UTF-8: convert the file "
        "to UTF-8 (for example with iconv)"
    )


def _json_lines(stream: _Stream, path: Path, field: str) -> Iterator[Document]:
    offset = 0
    number = 0
    while line := _read(stream, 0, path, line=True):
        number += 1
        text = _decode(line, path, offset)
        offset += len(line)
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{where} is not JSON ({error}): each line must be one object"
            ) from error
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
        yield Document(value, where)


def _pieces(stream: _Stream, path: Path) -> Iterator[Document]:
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
            yield Document(pending[begin:end], f"{path} (piece {number})")
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
