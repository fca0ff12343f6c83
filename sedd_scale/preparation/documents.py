"""Documents out of text files, one at a time, in an order that depends on their names only.

Inputs are globs of .txt, .jsonl and .tar (webdataset's, with .txt or .json members), each also with
.gz, .xz or .zst, of .parquet, or `builtin:python` (see builtin_text). In a .jsonl each line is a
document, the text under one field, as in a .parquet each row. A .txt is one document, with one
exception: when a lone .txt is the whole input, it is cut into documents at blank lines, each of at
least 2,000 characters, so that a single file can give both training and validation text.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sedd_scale.errors import DataError
from sedd_scale.preparation.builtin_text import builtin_python_documents
from sedd_scale.preparation.document_formats import FORMAT_NAMES, FORMATS, read_records

BUILTIN_PYTHON = "builtin:python"


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
        field: the field of a .jsonl line or the column of a .parquet that holds the text.

    Raises:
        DataError: a glob matches no file, a file has no known format or is empty; while iterating,
            a byte is not UTF-8, a line is not JSON, a field is missing, or a file is damaged.
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
        open_now = self._raw is not None and not self._raw.closed
        return self._finished_bytes + (self._raw.tell() if open_now and self._raw else 0)

    def __iter__(self) -> Iterator[Document]:
        return self.documents_after(START)

    def documents_after(self, place: Place) -> Iterator[Document]:
        """The documents behind a place that one of them gave as `after`."""
        self._finished_bytes = 0
        if self.builtin and place.file < 0:
            rows = builtin_python_documents()
            for number, row in enumerate(rows[place.records :], start=place.records + 1):
                yield Document(row["text"], BUILTIN_PYTHON, Place(-1, number, 0))
        lone_file = len(self.files) == 1 and not self.builtin
        for number, path in enumerate(self.files):
            if number >= place.file:
                behind = (place.records, place.offset) if number == place.file else (0, 0)
                with open(path, "rb") as raw:
                    self._raw = raw
                    for record in read_records(
                        raw, path, field=self.field, in_pieces=lone_file, after=behind
                    ):
                        after = Place(number, record.records, record.offset)
                        yield Document(record.text, record.source, after)
                self._raw = None
            self._finished_bytes += path.stat().st_size

    def identity(self) -> list[list[str | int]]:
        """Name, size and time of change of each file: what a resumed preparation compares."""
        found: list[list[str | int]] = []
        for path in self.files:
            status = path.stat()
            found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        return found


def _expand(patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns match, each once, sorted by name within a pattern."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        literal = os.path.expanduser(pattern)
        named = os.path.exists(literal)  # brackets may be part of a name
        matches = [literal] if named else sorted(glob.glob(literal, recursive=True))
        if not matches:
            raise DataError(f"input {pattern} matches no file: check the path")
        for name in matches:
            path = Path(name)
            if path.is_dir():
                raise DataError(f"input {name} is a directory: give a glob such as {name}/*.txt")
            if FORMATS.search(path.name) is None:
                raise DataError(f"input {name} has no known format: give {FORMAT_NAMES}")
            if path.stat().st_size == 0:
                raise DataError(f"input {name} is empty: remove it or give a file with text")
            files[path] = None
    return list(files)
