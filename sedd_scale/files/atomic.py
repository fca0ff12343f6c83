"""Files that appear whole or not at all, and never in the place of another."""

import contextlib
import os
from pathlib import Path

from sedd_scale.errors import DataError, SeddScaleError
from sedd_scale.files.compressed import plain_name


def refuse_existing_output(
    path: Path, name: str = "--output ", error: type[SeddScaleError] = DataError
) -> None:
    """Raise `error` where an output would be written over, or cannot be written at all.

    Args:
        name: what stands before the path in the error.
    """
    parent = path.parent
    if path.exists() or path.is_symlink():
        raise error(f"{name}{path} exists already: remove it or give another name")
    if packed := plain_name(path.name)[1]:
        raise error(f"{name}{path} is not compressed when written: leave {packed} out")
    if not parent.is_dir():
        raise error(f"{name}{path}: there is no directory {parent}; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise error(f"{name}{path}: directory {parent} is not writable; give another")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name in the same directory, then rename it to `path`.

    A reader never sees a part of the file, several processes may write at once, and a crash leaves
    at most a `.tmp` beside it. A power failure may undo the renaming: where that matters, call
    `sync_to_disk` on the directory.

    Raises:
        OSError: it cannot be written, as on a full disk; names `path`, and leaves nothing.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_to_disk(path: Path) -> None:
    """Wait until a file's or a directory's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
