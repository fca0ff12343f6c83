"""Writing shards, so that a killed process can be resumed."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from sedd_scale.data.shards import HASH_READ_BYTES
from sedd_scale.data.tar_blocks import RecordFormat, token_dtype
from sedd_scale.errors import DataError

WRITE_BLOCKS = 1024


class ShardWriter:
    """Writes the blocks of one split into shards of `blocks_per_shard` blocks.

    A shard grows under a `.tmp` name and is renamed when complete. Equal blocks give equal bytes.

    Args:
        directory: the dataset's directory, which exists.
        split: "train", "valid" or "test".
        block_length: L, tokens per block.
        vocab_size: N, which decides the dtype.
        blocks_per_shard: blocks in every shard but the last.
        state: what `save_state` gave, to resume from there: later bytes are cut off and later
            shards removed.

    Raises:
        DataError: the files that `state` speaks of are not there.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        block_length: int,
        vocab_size: int,
        blocks_per_shard: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.shards: list[dict[str, Any]] = []
        self.num_blocks = 0
        self._directory = directory
        self._split = split
        self._format = RecordFormat(block_length, token_dtype(vocab_size))
        self._blocks_per_shard = blocks_per_shard
        self._blocks_in_shard = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        if state is not None:
            self._restore(state)

    def write(self, tokens_KL: npt.NDArray[Any]) -> None:
        """Append K blocks of L ids."""
        done = 0
        while done < len(tokens_KL):
            if self._file is None:
                self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed by _end)
                self._digest = hashlib.sha256()
                self._blocks_in_shard = 0
            room = min(WRITE_BLOCKS, self._blocks_per_shard - self._blocks_in_shard)
            part = tokens_KL[done : done + room]
            self._append(self._format.records(self.num_blocks, part).data.cast("B"))
            done += len(part)
            self.num_blocks += len(part)
            self._blocks_in_shard += len(part)
            if self._blocks_in_shard == self._blocks_per_shard:
                self._end()

    def close(self) -> None:
        """Complete the last shard."""
        if self._file is not None:
            self._end()

    def release(self) -> None:
        """Close the unfinished shard, if any, as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def save_state(self) -> dict[str, Any]:
        """Make what was written durable and describe it, of plain types."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {
            "shards": list(self.shards),
            "partial_blocks": 0 if self._file is None else self._blocks_in_shard,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.shards = list(state["shards"])
        self._blocks_in_shard = state["partial_blocks"]
        self.num_blocks = sum(shard["blocks"] for shard in self.shards) + self._blocks_in_shard
        for shard in self.shards:
            path = self._directory / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise _lost(path)
        if not self._temporary.exists() and self._path.exists():
            os.replace(self._path, self._temporary)  # completed after the state was saved
        if self._blocks_in_shard:
            size = self._blocks_in_shard * self._format.stride
            if not self._temporary.exists() or self._temporary.stat().st_size < size:
                raise _lost(self._temporary)
            with open(self._temporary, "rb+") as stream:
                stream.truncate(size)
                while content := stream.read(HASH_READ_BYTES):
                    self._digest.update(content)
            self._file = open(self._temporary, "ab")  # noqa: SIM115 (closed by _end)
        kept = {shard["name"] for shard in self.shards}
        if self._blocks_in_shard:
            kept.add(self._temporary.name)
        for path in self._directory.glob(f"{self._split}-*.tar*"):
            if path.name not in kept:
                path.unlink()

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self.shards):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(self._path.name + ".tmp")

    def _append(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        self._digest.update(content)
        self._file.write(content)

    def _end(self) -> None:
        assert self._file is not None
        self._append(self._format.closing(self._blocks_in_shard))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        self.shards.append(
            {
                "name": self._path.name,
                "first_block": self.num_blocks - self._blocks_in_shard,
                "blocks": self._blocks_in_shard,
                "bytes": self._format.tar_bytes(self._blocks_in_shard),
                "sha256": self._digest.hexdigest(),
            }
        )
        self._file = None
        self._blocks_in_shard = 0


def _lost(path: Path) -> DataError:
    return DataError(
        f"the unfinished preparation lacks {path}, or it was cut short: remove {path.parent} and "
        "prepare again"
    )
