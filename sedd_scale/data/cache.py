"""A bounded cache of remote files on this node, shared by its processes.

Files are kept under their SHA-256, so that a changed dataset never meets old bytes. A file is
downloaded by one process, the others wait for it at a file lock; it appears under its name only
when its size and SHA-256 are right. The files used longest ago make room for new ones.
"""

import contextlib
import fcntl
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from sedd_scale.data.remote_sources import Source
from sedd_scale.errors import DataError

ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5
NUM_LOCKS = 256
# A download writes all the time; one that has not for so long was killed.
STALE_PART_SECONDS = 3600.0

Result = TypeVar("Result")


class ChecksumError(DataError):
    """A file whose source gives, time after time, other bytes than the index says."""


class FileCache:
    """Files of remote datasets in a directory of this node.

    Args:
        directory: made if it is not there; best on a local disk.
        limit_bytes: size of all files together.
        first_pause: seconds before the second attempt; each later pause is twice as long.
    """

    def __init__(
        self, directory: Path, limit_bytes: int, *, first_pause: float = FIRST_PAUSE_SECONDS
    ) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self.first_pause = first_pause
        (directory / "locks").mkdir(parents=True, exist_ok=True)
        (directory / "files").mkdir(exist_ok=True)

    def open(self, source: Source, name: str, *, sha256: str, size: int) -> BinaryIO:
        """The file, open for reading; downloaded if it is not here.

        Raises:
            DataError: the source does not give it, after ATTEMPTS attempts.
            ChecksumError: the source gives other bytes.
        """
        path = self.directory / "files" / sha256
        while True:
            try:
                stream = open(path, "rb")  # noqa: SIM115 (the caller's to close)
            except FileNotFoundError:
                # Another process may evict it again before it is opened here: then once more.
                self._download(source, name, path, sha256=sha256, size=size)
                continue
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
            return stream

    def _download(self, source: Source, name: str, path: Path, *, sha256: str, size: int) -> None:
        with self._lock(f"{int(sha256[:8], 16) % NUM_LOCKS:02x}"):
            if path.exists():
                return
            self._make_room(size, source.describe(name))
            part = path.with_name(path.name + ".part")
            try:
                with open(part, "wb+") as stream:

                    def attempt() -> None:
                        _append_rest(source, name, stream, sha256=sha256, size=size)

                    retry(attempt, source.describe(name), first_pause=self.first_pause)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self, size: int, what: str) -> None:
        if size > self.limit_bytes:
            raise DataError(
                f"{what} has {size} bytes, more than the whole cache: raise data.cache_gb"
            )
        with self._lock("room"):
            files = []
            for path in (self.directory / "files").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
            total = sum(entry[1] for entry in files)
            for used, bytes_of_file, path in sorted(files):
                if total + size <= self.limit_bytes:
                    return
                if path.suffix != ".part" or time.time() - used > STALE_PART_SECONDS:
                    path.unlink(missing_ok=True)
                    total -= bytes_of_file

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.directory / "locks" / name, "wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def read_whole(source: Source, name: str, *, first_pause: float = FIRST_PAUSE_SECONDS) -> bytes:
    """A small file of a source, not kept; retried like any other. Raises DataError."""

    def attempt() -> bytes:
        return b"".join(source.read(name, 0)[1])

    return retry(attempt, source.describe(name), first_pause=first_pause)


def retry(attempt: Callable[[], Result], what: str, *, first_pause: float) -> Result:
    """The result of `attempt`, made again after an OSError, with growing pauses.

    Raises:
        DataError: it failed ATTEMPTS times; ChecksumError if at last by its checksum.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _OtherBytes as error:
            if number == ATTEMPTS:
                raise ChecksumError(f"{what} {error}: prepare it again or copy it again") from error
        except OSError as error:
            if number == ATTEMPTS:
                raise DataError(
                    f"{what} cannot be read after {ATTEMPTS} attempts ({error}): check the source"
                ) from error
        # Many nodes that met one failure must not come back all at once.
        time.sleep(first_pause * 2 ** (number - 1) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


class _OtherBytes(OSError):
    pass


def _append_rest(source: Source, name: str, stream: BinaryIO, *, sha256: str, size: int) -> None:
    """Go on with a download where the last attempt ended; the file is right when this returns."""
    have = stream.seek(0, os.SEEK_END)
    begin, content = source.read(name, have)
    stream.seek(begin)
    stream.truncate()
    for part in content:
        stream.write(part)
        if stream.tell() > size:
            break
    have = stream.tell()
    if have < size:
        stream.flush()
        raise OSError(f"it ended after {have} of {size} bytes")
    digest = hashlib.sha256()
    stream.seek(0)
    while part := stream.read(1 << 20):
        digest.update(part)
    if have != size or digest.hexdigest() != sha256:
        stream.seek(0)
        stream.truncate()
        found = f"more than {size} bytes" if have != size else f"SHA-256 {digest.hexdigest()}"
        raise _OtherBytes(f"has {found}, the index says {size} bytes with {sha256}")
