"""Documents out of text files, one at a time, in an order that depends on their names only.

Inputs are globs of files (see document_formats), or `builtin:python` (see builtin_text). In a
.jsonl each line is a document, the text under one field, as in a .parquet each row. A text is one
document, with one exception: when a lone text is the whole input, it is cut into documents at blank
lines, each of at least 2,000 characters, so that one file can give both training and validation
text.
"""

import argparse
import codecs
import glob
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.files.compressed import decompressed, plain_name
from sedd_scale.preparation.archives import METADATA, archive_rows
from sedd_scale.preparation.builtin_text import builtin_python_documents
from sedd_scale.preparation.document_formats import (
    ARCHIVES,
    FORMATS,
    LINE_ENDS,
    LeftOut,
    ReadText,
    Row,
    format_by_name,
    plain_rows,
    text_of,
)

BUILTIN_PYTHON = "builtin:python"
_TABLES = (".csv", ".tsv", ".xlsx", ".arrow", ".feather", ".h5", ".hdf5", ".npy", ".npz", ".pdf")
FORMAT_HELP = (
    "text (.txt, .md, .tokens, .raw or any other name), .jsonl, .json, .parquet, .tar (webdataset) "
    "and .zip, each also .gz, .xz, .zst or .bz2"
)

# A format, and the bytes that tell it, with their place.
_MAGIC = (("tar", 257, b"ustar"), ("parquet", 0, b"PAR1"), ("zip", 0, b"PK\3\4"))
_LIKE_JSON = re.compile(rb'\s*(?:\[\s*)?\{\s*"[^"\n]{0,99}"\s*:')


class Place(NamedTuple):
    """A place in the input: which file, how many of its records are behind, the byte offset there.

    File -1 is the built-in text.
    """

    file: int
    records: int
    offset: int


START = Place(-1, 0, 0)


class Document(NamedTuple):
    """A text, where it came from ("FILE:LINE" for a line of a .jsonl), and the place behind it."""

    text: str
    source: str
    after: Place = START


class DocumentStream:
    """The documents of `inputs`; iterating again reads them again, in the same order.

    Args:
        inputs: globs, paths or `builtin:python`.
        field: the field of a .jsonl line or the column of a .parquet with the text; None: all.
        format: of all files; None: each by its first bytes or its name.
        members: of archives, only those whose names end in this; None: text and JSON.
        in_pieces: cut a lone text into documents.

    Attributes:
        notes: what the last reading left out so far, or changed, counted; those who take documents
            add what they leave out.

    Raises:
        ConfigError: a field or members are given, and no file that has such.
        DataError: a glob matches no file, a file is empty or of a format that is not read; while
            iterating, a byte is not UTF-8, a line is not JSON, a field is missing, or a file is
            damaged.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        field: str | None = "text",
        format: str | None = None,
        members: str | None = None,
        in_pieces: bool = True,
    ) -> None:
        self.field, self.format, self.members = field, format, members
        self.builtin = BUILTIN_PYTHON in inputs
        self.files = _expand([name for name in inputs if name != BUILTIN_PYTHON], format)
        self._refuse_idle_options()
        self._in_pieces = in_pieces and len(self.files) == 1 and not self.builtin
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.notes: Counter[str] = Counter()
        self._finished_bytes = 0
        self._raw: BinaryIO | None = None

    def _refuse_idle_options(self) -> None:
        """Raise ConfigError where no file is of a kind that an option is for."""
        named = self.field not in (None, "text")
        if not named and self.members is None:
            return
        found = {format_of(path, self.format) for path in self.files}
        if self.members is not None and not found & {*ARCHIVES}:
            raise ConfigError("no input is a .tar or .zip, which --members is for: leave it out")
        if named and found <= {"text"}:
            first = [*self.files, BUILTIN_PYTHON][0]
            raise ConfigError(
                f"{first} is text and has no field {self.field!r}: leave --field out, or give a "
                ".jsonl or .parquet file"
            )

    @property
    def bytes_read(self) -> int:
        """Bytes on disk consumed so far, out of `total_bytes`; for a progress bar."""
        open_now = self._raw is not None and not self._raw.closed
        return self._finished_bytes + (self._raw.tell() if open_now and self._raw else 0)

    def __iter__(self) -> Iterator[Document]:
        return self.documents_after(START)

    def documents_after(self, place: Place) -> Iterator[Document]:
        """The documents behind a place that one of them gave as `after`."""
        self._finished_bytes = 0
        self.notes = Counter()
        if self.builtin and place.file < 0:
            rows = builtin_python_documents()
            for number, own in enumerate(rows[place.records :], start=place.records + 1):
                yield Document(own["text"], BUILTIN_PYTHON, Place(-1, number, 0))
        for number, row in self.rows_after(place):
            text = text_of(row, self.field or "text")
            if isinstance(text, LeftOut):
                self.notes[str(text)] += 1
                continue
            if isinstance(text, ReadText):
                self.notes[LINE_ENDS] += 1
            yield Document(str(text), row.where, Place(number, row.number, row.offset))

    def rows_after(self, place: Place) -> Iterator[tuple[int, Row]]:
        """The rows of all files behind a place, with the number of their file."""
        for number, path in enumerate(self.files):
            if number >= place.file:
                skip, offset = place[1:] if number == place.file else (0, 0)
                with open(path, "rb") as self._raw:
                    stream, kind = decompressed(self._raw, str(path))
                    format = self.format or _format(stream, str(path))
                    if format in ARCHIVES:
                        rows = archive_rows(stream, str(path), format, self.field, self.members)
                    else:
                        at = (skip, 0 if kind else offset)
                        rows = plain_rows(
                            stream, str(path), format, self.field, self._in_pieces, at
                        )
                    yield from ((number, row) for row in rows if row.number > skip)
                self._raw = None
            self._finished_bytes += path.stat().st_size

    def identity(self) -> list[list[str | int]]:
        """Name, size and time of change of each file: what a resumed preparation compares."""
        found: list[list[str | int]] = []
        for path in self.files:
            status = path.stat()
            found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        return found


def _expand(patterns: Sequence[str], format: str | None) -> list[Path]:
    """The files that the patterns match, sorted by name within a pattern.

    A file is taken once, by its first name: other spellings of it and links to it add nothing.
    """
    files: dict[tuple[int, int], Path] = {}
    for pattern in patterns:
        literal = os.path.expanduser(pattern)
        named = os.path.exists(literal)  # brackets may be part of a name
        matches = [literal] if named else sorted(glob.glob(literal, recursive=True))
        if not matches:
            raise DataError(f"input {pattern} matches no file: check the path")
        for name in matches:
            path = Path(name)
            check_name(path, format)
            status = path.stat()
            files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())


def add_format_options(parser: argparse.ArgumentParser, field: str | None = None) -> None:
    """The options of a command that reads people's files; `field` is the default of --field."""
    parser.add_argument(
        "--field", default=field, help="of a .jsonl line or column of a .parquet, the text (text)"
    )
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
    """Raise DataError where a file of this name and format cannot be read whatever it holds."""
    if path.is_dir():
        raise DataError(f"input {path} is a directory: give files, such as {path}/*.txt")
    if not path.exists():
        raise DataError(f"input {path} is a link to nothing: remove it")
    if not path.is_file():
        raise DataError(
            f"input {path} is no file that can be read twice, as a pipe cannot: save it to a file"
        )
    if not os.access(path, os.R_OK):
        raise DataError(f"input {path} may not be read: change its permissions or leave it out")
    if path.stat().st_size == 0:
        raise DataError(f"input {path} is empty: remove it or give a file with text")
    suffix = Path(plain_name(path.name)[0]).suffix
    if given is None and suffix in _TABLES:
        raise DataError(
            f"input {path} has no format that is read: convert it to .jsonl or .parquet, or give "
            "--format text to take it as it stands"
        )
    if METADATA.search(path.name):
        raise DataError(
            f"input {path} is metadata of another system and no text: remove it, or give a glob "
            "that leaves it out"
        )


def format_of(path: Path, given: str | None = None) -> str:
    """The format of a file: `given`, or by its first bytes, or by its name."""
    if given is not None:
        return given
    with path.open("rb") as raw:
        stream, _ = decompressed(raw, str(path))
        return _format(stream, str(path))


def _format(stream: io.BufferedReader, where: str) -> str:
    head = stream.peek(512)
    for format, place, magic in _MAGIC:
        if head.startswith(magic, place):
            return format
    named = format_by_name(Path(where).name)
    if named in (None, "text") and _LIKE_JSON.match(head.removeprefix(codecs.BOM_UTF8)):
        raise DataError(
            f"{where} may be text or JSON: say which with --format text, jsonl (an object per "
            "line) or json (an array)"
        )
    zeros = head.count(0) > len(head) // 4 and head[:1] not in (b"\xfe", b"\xff")
    if zeros and named in (None, "text"):
        raise DataError(
            f"{where} is mostly zeros and no UTF-8 text: convert it (for example with iconv -f "
            "UTF-16LE -t UTF-8), or take it as it stands with --format text"
        )
    return named or "text"


def open_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of objects, such as prompts; a name that says no format holds JSON lines.

    Raises:
        DataError: the file is missing or cannot be read; from `value`, a row is no object.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: give a JSONL file")
    given = "jsonl" if format_by_name(path.name) in (None, "text") else None
    for _, row in DocumentStream([str(path)], field=None, format=given).rows_after(START):
        yield row
