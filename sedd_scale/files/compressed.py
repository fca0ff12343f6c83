"""A file's content whatever compressed it, which its first bytes tell, however it is called."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from sedd_scale.errors import DataError

# First bytes of what is read; none of them begins UTF-8 text.
_MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".xz": (b"\xfd7zXZ\0",),
    ".bz2": tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + k]) + b"\x2a\x4d\x18" for k in range(16))),
    ".lzma": (b"]\0\0\x80\0", b"]\0\0\0\1"),
}
_OTHERS = {
    "lz4": b"\x04\x22\x4d\x18",
    "compress": b"\x1f\x9d",
    "7-zip": b"7z\xbc\xaf\x27\x1c",
    "rar": b"Rar!\x1a\x07",
}
_ALL_MAGIC = tuple(magic for some in _MAGIC.values() for magic in some)
_ALSO_CALLED = {".zstd": ".zst", ".bz": ".bz2", ".gzip": ".gz"}
_ARCHIVES = {".tgz": ".gz", ".txz": ".xz", ".tbz": ".bz2", ".tbz2": ".bz2", ".tzst": ".zst"}
_READ_BYTES, _PACKED_BYTES = 1 << 17, 1 << 15
# The longest window that zstd writes, with --long=31; memory is taken as the file asks for it.
_ZSTD_WINDOW = 2**31


def plain_name(name: str) -> tuple[str, str | None]:
    """A file's name in small letters without its compression, and the compression (".gz")."""
    stem, dot, last = name.lower().rpartition(".")
    suffix = _ALSO_CALLED.get(dot + last, dot + last)
    if suffix in _ARCHIVES:
        return f"{stem}.tar", _ARCHIVES[suffix]
    return (stem, suffix) if dot and suffix in _MAGIC else (name.lower(), None)


def decompressed(raw: BinaryIO, where: str) -> tuple[io.BufferedReader, str | None]:
    """The content of an open file, all members or frames of it, and what compressed it.

    Args:
        raw: at its beginning.
        where: the file's name, for the compression it says, and for errors; while reading, a
            `DataError` names it where the content is damaged or cut short.

    Raises:
        DataError: it is not what its name says, is compressed by something that is not read, or
            needs a package that is not installed.
    """
    plain = cast(io.BufferedReader, raw if hasattr(raw, "peek") else io.BufferedReader(raw))
    head = plain.peek(16)[:16]
    found = [kind for kind, magic in _MAGIC.items() if head.startswith(magic)]
    kind = plain_name(Path(where).name)[1] or (found[0] if found else None)
    if kind is None:
        for name, magic in _OTHERS.items():
            if head.startswith(magic):
                raise DataError(f"{where} is packed by {name}, which is not read: unpack it")
        return plain, None
    joined: Any = _Joined(_frames(plain, where, kind))
    content = io.BufferedReader(joined, _READ_BYTES)
    if content.peek(16).startswith(_ALL_MAGIC):
        raise DataError(f"{where} is compressed twice: unpack it once")
    return content, kind


def _frames(raw: io.BufferedReader, where: str, kind: str) -> Iterator[bytes]:
    """The content of frame after frame, where some of the libraries' own streams stop early.

    A frame that is cut short and what is no frame behind one are errors; zeros between are padding.
    """
    makers: dict[str, Callable[[], Any]] = {
        ".gz": partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS),
        ".bz2": bz2.BZ2Decompressor,
    }
    make, errors = makers.get(kind, lzma.LZMADecompressor), [OSError, lzma.LZMAError, zlib.error]
    if kind == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(
                f"{where} needs the package zstandard: pip install 'sedd_scale[zstd]'"
            ) from error
        make = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj
        errors.append(zstandard.ZstdError)
    frame, packed = None, b""
    try:
        while packed := packed or raw.read(_PACKED_BYTES):
            if frame is None and not (packed := packed.lstrip(b"\0")):
                continue
            frame = frame or make()
            yield frame.decompress(packed)
            packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame is not None:
            raise OSError("it ends within a frame")
    except tuple(errors) as error:
        raise DataError(
            f"{where} is cut short or not a {kind} file ({error}): replace it"
        ) from error


class _Joined(io.RawIOBase):
    """Parts as one stream, whose reads are full to its end."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._ready, self._given = parts, bytearray(), 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._given

    def readinto(self, buffer: Any) -> int:
        while len(self._ready) < len(buffer) and (part := next(self._parts, None)) is not None:
            self._ready += part
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        del self._ready[:count]
        self._given += count
        return count
