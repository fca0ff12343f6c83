"""The rows of the members of a tar or a zip, in their order.

A member is read as a file of its name is. What other systems put beside files is left out, and so
is what is neither text nor JSON, such as the pictures of a webdataset; both are counted. Members
whose names differ in the last suffix only are one sample: of a text and its JSON the text is the
document, unless the JSON has another one.
"""

import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from sedd_scale.errors import DataError
from sedd_scale.files.compressed import decompressed, plain_name
from sedd_scale.preparation.document_formats import (
    ARCHIVES,
    LeftOut,
    Row,
    format_by_name,
    is_file,
    plain_rows,
)

OTHER_SYSTEMS = "members that are metadata of other systems, left out"
_OTHER_SYSTEMS = re.compile(
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
            documents = documents or not isinstance(row.value, _Nothing)
            yield row._replace(number=number, offset=0)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{where} is cut short or not a tar file ({error}): replace it") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{where} cannot be read as a zip file ({error}): replace it") from error
    if not documents:
        wanted = members or ".txt or .json, or as other text and JSON"
        raise DataError(
            f"{where} holds no member that ends in {wanted}: name others with --members SUFFIX, or "
            "leave it out"
        )


def _rows(
    found: Iterator[_Member], where: str, field: str | None, members: str | None
) -> Iterator[Row]:
    sample: list[tuple[str, list[Row]]] = []
    seen: dict[str, set[str]] = {}
    for name, opened in found:
        kind, place = format_by_name(name), f"{where}:{name}"
        if _OTHER_SYSTEMS.search(name):
            reason: str | None = OTHER_SYSTEMS
        elif members is not None:
            reason = None if name.endswith(members) else f"members without {members}, left out"
        else:
            what = f"{PurePosixPath(name).suffix} members".strip()
            reason = None if kind not in (None, *ARCHIVES) else f"{what}, left out"
        if reason is not None:
            if field is not None:
                yield Row(place, 0, _Nothing(reason))
            continue
        if sample and (_stem(sample[0][0]) != _stem(name) or name in dict(sample)):
            yield from _of_sample(sample, where, field)
            sample = []
        rows = plain_rows(decompressed(opened(), place)[0], place, kind or "text", field)
        if kind in ("text", "json") and members is None and field is not None:
            _refuse_texts(seen, name, where)
            sample.append((name, [_read(row) for row in rows]))
        else:
            yield from rows
    yield from _of_sample(sample, where, field)


@dataclass(frozen=True)
class _Nothing:
    """A value for what is left out."""

    reason: str

    def __call__(self) -> LeftOut:
        return LeftOut(self.reason)


def _read(row: Row) -> Row:
    """A row whose value was read, for its stream goes on."""
    value = row.value()
    return row._replace(value=lambda: value)


def _stem(name: str) -> str:
    return plain_name(name)[0].rpartition(".")[0]


def _of_sample(sample: list[tuple[str, list[Row]]], where: str, field: str | None) -> Iterator[Row]:
    """Rows of members that are one sample: a text, an object, or a text and what belongs to it."""
    texts = [str(row.value()) for name, (row, *_) in sample if format_by_name(name) == "text"]
    if len(texts) > 1:
        names = ", ".join(name for name, _ in sample)
        raise DataError(f"{where} has a text twice ({names}): say which with --members SUFFIX")
    for name, rows in sample:
        if not texts or format_by_name(name) == "text":
            yield from rows
            continue
        for row in rows:
            beside = row.value().get(field)
            if isinstance(beside, str) and beside.strip() != texts[0].strip():
                raise DataError(
                    f"{row.where} has the field {field!r}, and a text beside it: say which is the "
                    "document with --members .txt or --members .json"
                )
        yield Row(f"{where}:{name}", 0, _Nothing(".json members beside a text, left out"))


def _refuse_texts(seen: dict[str, set[str]], name: str, where: str) -> None:
    """Raise DataError where a second sample holds the same several texts under its key.

    Args:
        seen: the suffixes of each of the last two keys; names end their key at the first dot.
    """
    key, suffix = re.findall(r"^((?:.*/)?[^./]*)(.*)$", name)[0]
    if key not in seen and len(seen) == 2:
        del seen[next(iter(seen))]
    seen.setdefault(key, set()).add(suffix)
    first, second = ({one for one in of if "json" not in one} for of in [*seen.values(), set()][:2])
    if len(first) > 1 and first == second:
        raise DataError(
            f"{where} has several texts in a sample ({', '.join(sorted(first))}): name one with "
            f"--members {min(first)}, or take all with --members .{suffix.rpartition('.')[2]}"
        )


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
    source: Any = stream if is_file(stream) else io.BytesIO(stream.read())
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        if entries and min(entry.header_offset for entry in entries) > 0:
            raise DataError(f"{where} is several zip files end to end: give each by itself")
        for entry in entries:
            if not entry.is_dir():
                yield entry.filename, lambda: archive.open(entry)  # noqa: B023
