"""The rows of the members of a tar or a zip, in their order.

A member is read as a file of its name is. What other systems put beside files is left out, and so
is what is neither text nor JSON, such as the pictures of a webdataset; both are counted. An archive
within one is read where it is named by `--members`. Members
whose names are equal up to the first dot are a sample, as in webdataset: beside its text, JSON is
left out, unless it has a text of its own.
"""

import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from sedd_scale.errors import DataError
from sedd_scale.files.compressed import decompressed
from sedd_scale.preparation.document_formats import (
    ARCHIVES,
    LeftOut,
    Row,
    format_by_name,
    plain_rows,
    seekable,
)

_MOST_OBJECTS = 64  # held of one key
_OF_READS = (EOFError, OSError, ValueError)
OTHER_SYSTEMS = "members that are metadata of other systems, left out"
METADATA = re.compile(
    r"(?:^|/)(?:\._|(?:__MACOSX|PaxHeaders?(?:\.\d+)?|\.AppleDouble|\.ipynb_checkpoints|@eaDir)/"
    r"|(?:\.DS_Store|Thumbs\.db|desktop\.ini|@PaxHeader|@LongLink)$)",
    re.IGNORECASE,
)


# A member's name, and what opens it while the archive stands there.
_Member = tuple[str, Callable[[], Any]]


def archive_rows(
    stream: io.BufferedReader,
    where: str,
    format: str,
    field: str | None,
    members: str | None,
) -> Iterator[Row]:
    """The rows of an archive; arguments as of `read_rows`.

    Raises:
        DataError: it is damaged or holds no document, or a sample holds several.
    """
    number = 0
    documents = False
    found = _tar_members(stream) if format == "tar" else _zip_members(stream, where)
    try:
        for row in _rows(found, where, field, members):
            number += 1
            documents = documents or getattr(row.value, "func", None) is not LeftOut
            yield row._replace(number=number, offset=0)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError, *_OF_READS) as error:
        raise DataError(
            f"{where} is cut short or not a {format} file ({error}): replace it"
        ) from error
    if not documents:
        wanted = members or ".txt or .json, or as other text and JSON"
        raise DataError(
            f"{where} holds no member that ends in {wanted}: name others with --members SUFFIX, or "
            "leave it out"
        )


def _rows(
    found: Iterator[_Member], where: str, field: str | None, members: str | None
) -> Iterator[Row]:
    sample = _Sample("", where, field, set())
    for name, opened in found:
        kind, place = format_by_name(name), f"{where}:{name}"
        if METADATA.search(name):
            reason: str | None = OTHER_SYSTEMS
        elif members is not None:
            reason = None if name.endswith(members) else f"members without {members}, left out"
        else:
            what = f"{PurePosixPath(name).suffix} members".strip()
            reason = None if kind not in (None, *ARCHIVES) else f"{what}, left out"
        key, suffix = re.findall(r"^((?:.*/)?[^./]*)(.*)$", name, re.DOTALL)[0]
        if reason != OTHER_SYSTEMS and (key != sample.key or len(sample.objects) > _MOST_OBJECTS):
            yield from sample.rest()
            sample = _Sample(key, where, field, set(sample.texts) or sample.before)
        if reason is not None:
            sample.has_others = sample.has_others or reason != OTHER_SYSTEMS
            if field is not None:
                yield Row(place, 0, partial(LeftOut, reason))
            continue
        content, _ = decompressed(opened(), place)
        if kind in ARCHIVES:
            yield from archive_rows(content, place, kind, field, None)
            continue
        rows = plain_rows(content, place, kind or "text", field)
        if members is not None or field is None or kind not in ("text", "json"):
            yield from rows
        elif kind == "json":
            sample.objects += map(_read, rows)
        else:
            yield from (sample.add(suffix, _read(row)) for row in rows)
    yield from sample.rest()


def _read(row: Row) -> Row:
    """A row whose value was read, for its stream goes on."""
    value = row.value()
    return row._replace(value=lambda: value)


class _Sample:
    """Members of one key, which is a name up to its first dot.

    Args:
        before: the suffixes of the texts of the sample before.
    """

    def __init__(self, key: str, where: str, field: str | None, before: set[str]) -> None:
        self.key, self.before = key, before
        self.texts: dict[str, int] = {}
        self.objects: list[Row] = []
        self.has_others = False
        self._where, self._field = where, field

    def add(self, suffix: str, row: Row) -> Row:
        """A row of a text."""
        text = str(row.value()).strip()
        if text:
            self.texts[suffix] = hash(text)
        return row

    def rest(self) -> Iterator[Row]:
        """Rows of its objects, left out where they belong to a text or to another object.

        Raises:
            DataError: it has several texts, and other members or the suffixes of the one before.
        """
        names = sorted(self.texts)
        if len(names) > 1 and (self.objects or self.has_others or set(names) == self.before):
            ends = {f".{name.rpartition('.')[2]}" for name in names}
            raise DataError(
                f"{self._where} has several texts in a sample ({', '.join(names)} of {self.key}): "
                f"name one with --members {names[0]}"
                + (f", or all with --members {ends.pop()}" if len(ends) == 1 else "")
            )
        held = [row.value().get(self._field) for row in self.objects]
        alone = not self.texts and not any(isinstance(text, str) for text in held)
        for row, text in zip(self.objects, held):
            if alone and self._field not in row.value():
                raise DataError(
                    f"{row.where} has no field {self._field!r}: name one with --field "
                    f"({', '.join(row.value())}), or name the documents with --members SUFFIX"
                )
            if alone or (isinstance(text, str) and not self.texts):
                yield row
            elif isinstance(text, str) and hash(text.strip()) not in self.texts.values():
                raise DataError(
                    f"{row.where} has the field {self._field!r}, and a text beside it: say which "
                    "is the document with --members .txt or --members .json"
                )
            elif self.texts or self._field not in row.value():
                yield row._replace(value=partial(LeftOut, "objects beside a document, left out"))
            else:
                yield row


class _Blocks:
    """What tarfile reads: block after block, with the last one at hand."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._ahead = b""
        self.last = b""

    def read(self, size: int) -> bytes:
        content, self._ahead = self._ahead or self._stream.read(size), b""
        self.last = content or self.last
        return content

    def to_next(self) -> bool:
        """Whether something follows the zeros at an archive's end; reading goes on there."""
        while block := self._stream.read(tarfile.BLOCKSIZE):
            if any(block):
                self._ahead = block
                return True
        return False


def _tar_members(stream: io.BufferedReader) -> Iterator[_Member]:
    """Members of all archives that stand end to end."""
    blocks = _Blocks(stream)
    while True:
        # Read block by block, tarfile never reads into a following archive.
        with tarfile.open(
            fileobj=cast(BinaryIO, blocks), mode="r|", bufsize=tarfile.BLOCKSIZE
        ) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, lambda: archive.extractfile(member)  # noqa: B023
        if any(blocks.last) or len(blocks.last) < tarfile.BLOCKSIZE:
            raise EOFError("it has no end mark")  # tarfile takes a damaged header for the end
        if not blocks.to_next():
            return


def _zip_members(stream: io.BufferedReader, where: str) -> Iterator[_Member]:
    with zipfile.ZipFile(seekable(stream)) as archive:
        entries = archive.infolist()
        if entries and min(entry.header_offset for entry in entries) > 0:
            raise DataError(
                f"{where} begins before its zip file, as several end to end do: give each by itself"
            )
        for entry in entries:
            if entry.flag_bits & 1:
                raise DataError(f"{where}:{entry.filename} is encrypted: unpack it")
            if not entry.filename.endswith("/"):
                yield entry.filename, lambda: archive.open(entry)  # noqa: B023
