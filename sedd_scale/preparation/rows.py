"""The rows of a file: texts, or objects with fields, each with its place."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.errors import DataError
from sedd_scale.files.compressed import plain_name

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
LINE_ENDS = "documents with line ends CRLF or CR, read as LF"


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
            raise not_utf8_column(where, field, error) from error
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


def not_utf8_column(where: str, name: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{where}: column {name!r} is not UTF-8 (byte 0x{error.object[error.start]:02x} at "
        f"{error.start}): mend the row"
    )


def is_file(stream: io.BufferedReader) -> bool:
    """Whether a stream is a file of the disk, where any place of it can be read."""
    return isinstance(getattr(stream, "raw", None), io.FileIO)
