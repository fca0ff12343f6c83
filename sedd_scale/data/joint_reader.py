"""The blocks of several datasets as one row."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.data.shards import BadShardError, BlockReader
from sedd_scale.errors import DataError

# The dataset's number in the mixture, the shard's in the dataset's split.
Shard = tuple[int, int]


class JointReader:
    """Blocks of several readers as one row.

    Attributes:
        block_length: L, tokens per block.
        first_blocks: the number of each reader's first block.
    """

    def __init__(self, readers: Sequence[BlockReader]) -> None:
        self.readers = readers
        self.block_length = readers[0].block_length
        self._ends = np.cumsum([len(reader) for reader in readers])
        self.first_blocks = self._ends - [len(reader) for reader in readers]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def spread(self, wanted: int, *, without: Collection[Shard] = ()) -> IntArray:
        """At most `wanted` block numbers, evenly spread; the same for every caller.

        Args:
            without: shards whose blocks are replaced, as far as others are left.

        Raises:
            DataError: no block is left.
        """
        blocks = spread_blocks(len(self), wanted)
        if not without:
            return blocks
        spare = np.setdiff1d(np.arange(len(self)), blocks)
        spare = spare[~self._in_shards(spare, without)]
        gone = np.flatnonzero(self._in_shards(blocks, without))
        chosen = spare[spread_blocks(len(spare), len(gone))]
        blocks[gone[: len(chosen)]] = chosen
        blocks = blocks[~self._in_shards(blocks, without)]
        if not len(blocks):
            names = ", ".join(reader.dataset.location for reader in self.readers)
            raise DataError(f"every validation shard of {names} is damaged: prepare it again")
        return blocks

    def shard_of_error(self, error: BadShardError) -> Shard:
        """Which shard of which reader an error speaks of."""
        fingerprints = [reader.dataset.fingerprint for reader in self.readers]
        return fingerprints.index(error.fingerprint), error.shard

    def _in_shards(self, blocks: IntArray, shards: Collection[Shard]) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(blocks), dtype=np.bool_)
        for number, reader in enumerate(self.readers):
            begin = self.first_blocks[number]
            here = (blocks >= begin) & (blocks < begin + len(reader))
            chosen = [shard for dataset, shard in shards if dataset == number]
            found[here] = np.isin(reader.shard_of_block(blocks[here] - begin), chosen)
        return found

    def read(self, block_ids: npt.ArrayLike) -> IntArray:
        """The blocks of these numbers; int64 [n, L]; raises as `BlockReader.read`."""
        wanted = np.asarray(block_ids, dtype=np.int64)
        tokens_BL = np.empty((len(wanted), self.block_length), dtype=np.int64)
        of_block = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(of_block).tolist():
            here = of_block == number
            tokens_BL[here] = self.readers[number].read(wanted[here] - self.first_blocks[number])
        return tokens_BL


def spread_blocks(num_blocks: int, wanted: int) -> IntArray:
    """At most `wanted` block numbers, evenly spread over a split; the same for every caller."""
    count = min(num_blocks, wanted)
    return np.arange(count, dtype=np.int64) * num_blocks // max(count, 1)
