"""Samples on disk while they are made: files beside the output that a killed run resumes from.

`samples.jsonl.parts` holds what the run was asked for (`run.json`) and files of finished batches,
one per writer. A batch is appended whole and made durable before the next begins, so a kill costs
at most the batches under way. A torn batch at a file's end is cut off; finished ones are never
drawn again. At the end the lines are merged in order into the output, which appears whole or not
at all.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sedd_scale.errors import DataError
from sedd_scale.files.atomic import refuse_existing_output, sync_to_disk
from sedd_scale.files.folder_lock import WITHOUT_LOCKS
from sedd_scale.files.identity import claim

RUN_FILE = "run.json"
LOCK_FILE = "lock"
_HEAD = re.compile(rb'\{"index": (\d+), ')
_OPEN_FILES = 128

Record = dict[str, Any]


class ShardDirectory:
    """The directory of one run's unfinished output; one process opens, recovers and merges it.

    Args:
        output: the file to be made.
        batches: indices of the samples of each batch; together 0..num_samples-1, each once.
    """

    def __init__(self, output: Path, batches: Sequence[Sequence[int]]) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".parts")
        self.batches = batches
        self._batch_of = array("q", bytes(8 * sum(map(len, batches))))
        for number, batch in enumerate(batches):
            for index in batch:
                self._batch_of[index] = number
        self._lock: BinaryIO | None = None

    def open(self, run: Mapping[str, Any], nonce: str) -> None:
        """Make or reopen the directory and keep other processes out until `close`.

        Args:
            run: JSON values by option; all must be those the directory was begun with.
            nonce: by which other processes know that they see the same directory.

        Raises:
            ConfigError: it was begun with other options.
            DataError: it is in use, or cannot be written.
        """
        try:
            self.path.mkdir(exist_ok=True)
            lock: BinaryIO = (self.path / LOCK_FILE).open("a+b")
        except OSError as error:
            raise DataError(
                f"--output {self.output} cannot be written: {error.strerror}"
            ) from error
        if not _locked(lock):
            lock.close()
            raise DataError(
                f"{self.path} is in use by another process: wait for its end, or give another "
                "--output"
            )
        try:
            self._check_run(run)
            lock.truncate(0)
            lock.write(nonce.encode())
            lock.flush()
            os.fsync(lock.fileno())
        except BaseException:
            lock.close()
            raise
        self._lock = lock

    def sees(self, nonce: str) -> bool:
        """Whether this process sees the directory that another opened with this nonce."""
        try:
            return (self.path / LOCK_FILE).read_bytes() == nonce.encode()
        except OSError:
            return False

    def recover(self) -> list[int]:
        """Cut torn batches off all files and return the numbers of the finished ones, sorted.

        Raises:
            DataError: a file is damaged before its end, or still being written.
        """
        finished = set()
        for path in self._files():
            with open(path, "r+b") as stream:
                if not _locked(stream):
                    raise DataError(
                        f"{path} is still being written by another process: wait for its end"
                    )
                good_end = 0
                for line in self._finished_lines(stream):
                    finished.add(self._batch_of[line.sample])
                    good_end = line.offset + line.size
                _refuse_damage(path, stream, good_end, max(map(len, self.batches)))
                if good_end < os.fstat(stream.fileno()).st_size:
                    stream.truncate(good_end)
                    os.fsync(stream.fileno())
        return sorted(finished)

    def next_number(self) -> int:
        """The first number no file of the directory has."""
        numbers = [int(path.stem.rpartition("-")[2]) for path in self._files()]
        return max(numbers, default=-1) + 1

    def writer(self, number: int) -> "PartWriter":
        """A new file of that number."""
        return PartWriter(self.path / f"part-{number:05d}.jsonl")

    def merge(self, on_record: Callable[[Record], None] = lambda record: None) -> None:
        """Write all samples in order into the output; the directory stays.

        Args:
            on_record: called with each record, in order.

        Raises:
            DataError: the output exists, a sample is missing, or a line is damaged.
        """
        files = self._files()
        count = len(self._batch_of)
        file_of, offset_of, size_of = (array("q", [-1]) * count for _ in range(3))
        for number, path in enumerate(files):
            with open(path, "rb") as stream:
                for line in self._finished_lines(stream):
                    if file_of[line.sample] < 0:
                        file_of[line.sample] = number
                        offset_of[line.sample], size_of[line.sample] = line.offset, line.size
        opened = functools.lru_cache(_OPEN_FILES)(lambda number: files[number].open("rb"))
        merged = self.path / f"merged.{os.getpid()}.tmp"
        try:
            with open(merged, "wb") as target:
                for index in range(count):
                    if file_of[index] < 0:
                        raise DataError(
                            f"{self.path} lacks sample {index}: start the same command again to "
                            "draw it"
                        )
                    source = opened(file_of[index])
                    source.seek(offset_of[index])
                    record = _parse(source.read(size_of[index]), files[file_of[index]])
                    del record["index"]
                    on_record(record)
                    target.write(sample_line(record))
                target.flush()
                os.fsync(target.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                merged.unlink()
            raise DataError(
                f"--output {self.output} cannot be written ({error.strerror}): mend that and start "
                "the same command again; finished samples are kept"
            ) from error
        refuse_existing_output(self.output)
        os.replace(merged, self.output)
        sync_to_disk(self.output.parent)

    def remove(self) -> None:
        """Remove the directory, once its samples stand in the output."""
        assert self.output.exists()
        self.close()
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("part-*.jsonl"))

    def _check_run(self, run: Mapping[str, Any]) -> None:
        path = self.path / RUN_FILE
        if self._files() and not path.is_file():
            raise DataError(
                f"{self.path} holds samples but no {RUN_FILE} to say of what: remove it"
            )
        claim(
            path,
            run,
            holds=f"{self.path} holds an unfinished run",
            remedy="give the same command to continue it, or remove it",
        )

    def _finished_lines(self, stream: BinaryIO) -> Iterator["_Line"]:
        """The lines of finished batches from the file's start, up to the first that is not one."""
        pending: list[_Line] = []
        offset = 0
        for raw in stream:
            head = _HEAD.match(raw)
            if head is None or not raw.endswith(b"}\n") or b"\0" in raw:
                return
            index = int(head[1])
            if index >= len(self._batch_of):
                return
            batch = self.batches[self._batch_of[index]]
            if index != batch[len(pending)]:
                return
            pending.append(_Line(index, offset, len(raw)))
            offset += len(raw)
            if len(pending) == len(batch):
                yield from pending
                pending = []


class PartWriter:
    """Appends finished batches to one new file and makes each durable.

    Raises:
        DataError: the file cannot be written; what was appended before stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reporting():
            self._stream = path.open("xb", buffering=0)
            _locked(self._stream)
            sync_to_disk(path.parent)
        self._end = 0

    def append(self, indices: Sequence[int], records: Sequence[Record]) -> None:
        """Write the records of one batch, whole."""
        lines = [sample_line({"index": index, **record}) for index, record in zip(indices, records)]
        content = memoryview(b"".join(lines))
        with self._reporting():
            try:
                while content:
                    content = content[self._stream.write(content) or 0 :]
                os.fsync(self._stream.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._stream.truncate(self._end)
                raise
        self._end += sum(map(len, lines))

    def close(self) -> None:
        """Close the file, and remove it where nothing was written."""
        if self._end == 0 and not self._stream.closed:
            self.path.unlink(missing_ok=True)
        self._stream.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be written ({error.strerror}): mend that and start the same "
                "command again; finished batches are kept"
            ) from error


class _Line(NamedTuple):
    sample: int
    offset: int
    size: int


def sample_line(record: Record) -> bytes:
    """A record as the output holds it."""
    text = json.dumps(record, ensure_ascii=False)
    # Some readers end a line at these too.
    for character in ("\x85", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    # A lone surrogate, which no UTF-8 can hold, becomes a question mark.
    return (text + "\n").encode("utf-8", errors="replace")


def _parse(raw: bytes, path: Path) -> Record:
    try:
        record: Record = json.loads(raw)
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}): remove it and start the same command again to draw its "
            "samples anew"
        ) from error
    return record


def _refuse_damage(path: Path, stream: BinaryIO, good_end: int, batch_size: int) -> None:
    """Raise DataError where more follows the last finished batch than one torn batch."""
    stream.seek(good_end)
    lines = sum(1 for line in stream if line.endswith(b"}\n"))
    if lines > batch_size:
        raise DataError(
            f"{path} is damaged after byte {good_end:,}, with {lines} more lines behind: restore "
            "it, or remove it to draw its samples anew"
        )


def _locked(stream: BinaryIO) -> bool:
    """Take the file's lock until it is closed; False where another process has it.

    Unlike that of `lock_folder` it also tells apart two who write in one process.
    """
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return True
        if isinstance(error, BlockingIOError):
            return False
        raise
    return True
