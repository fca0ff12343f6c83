"""How one rank writes its data file, hashed on the way; what damaged files raise when read."""

import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

from sedd_scale.checkpoint import fault_points
from sedd_scale.checkpoint.manifest import FileRecord

_BUFFER = 1 << 20

# What torch and pickle raise at the bytes of a file that is not what was written.
READ_ERRORS = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    MemoryError,
)


class HashingStream(io.BufferedWriter):
    """A file open for writing that hashes what goes through it.

    torch reports a failed write as an error of its own archive format; `failure` keeps the cause.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"), _BUFFER)
        self._digest = hashlib.sha256()
        self._size = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Hash and write bytes."""
        self._digest.update(data)
        try:
            written = super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._size += written
        if self._size > _BUFFER // 256:
            fault_points.reach("within a data file")
        return written

    def record(self) -> FileRecord:
        """Size and hash of what was written."""
        return FileRecord(self._size, self._digest.hexdigest())


class HashingFileSystem(FileSystem):
    """torch's file system, remembering the record of every file it wrote."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """A stream to write to or, as torch's, to read from."""
        if mode != "wb":
            with super().create_stream(path, mode) as plain:
                yield plain
            return
        stream = HashingStream(Path(path))
        try:
            with stream:
                yield stream
        finally:
            self.failure = self.failure or stream.failure
        self.records[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file and its record."""
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """torch's writer of checkpoint files: one file a rank, fsynced and hashed.

    Attributes:
        records: of the files that this process wrote, by name.
    """

    def __init__(self, directory: Path) -> None:
        # Without copying ahead, which would open the first GPU in a thread of every rank.
        super().__init__(
            directory,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=1,
            per_thread_copy_ahead=0,
        )
        self.fs: HashingFileSystem = HashingFileSystem()

    @property
    def records(self) -> dict[str, FileRecord]:
        """Size and hash of the files that this process wrote, by name."""
        return self.fs.records

    @property
    def failure(self) -> OSError | None:
        """What the operating system said of the first write that failed."""
        return self.fs.failure
