"""The order of blocks: a pure function, computed per sample, never stored.

Within an epoch blocks are shuffled in two levels. The shards are dealt in a random order and laid
end to end; that row of blocks is cut into windows, and each window is permuted by itself. Reading
so stays within the few shards of one window, while the window decides how well blocks mix. With a
window as large as the dataset, the order is one permutation of all blocks.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray

NUM_ROUNDS = 6
# Consecutive samples whose blocks are computed together.
RUN = 2048

_Words = npt.NDArray[np.uint64]


class Permutation:
    """A permutation of 0..size-1, a pure function of its key.

    Numbers are written as (left, right) in mixed radix over a near-square grid, and each round adds
    to one half a keyed hash of the other: a generalised Feistel network (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). Where the grid is larger than `size`, a result
    beyond it is permuted again until it falls inside ("cycle walking").

    Args:
        size: at least 1.
        key: any text.
    """

    def __init__(self, size: int, key: str) -> None:
        assert size >= 1
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        digest = hashlib.shake_256(f"{key}|{size}".encode()).digest(16 * NUM_ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, places: IntArray) -> IntArray:
        """Where each of 0..size-1 goes; int64, the shape of `places`."""
        numbers = self._rounds(places.astype(np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._rounds(numbers[outside])
        return numbers.astype(np.int64)

    def _rounds(self, numbers: _Words) -> _Words:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = np.divmod(numbers, columns)
        for turn in range(NUM_ROUNDS):
            left = (left + _mix(right ^ self._keys[2 * turn]) % rows) % rows
            right = (right + _mix(left ^ self._keys[2 * turn + 1]) % columns) % columns
        return left * columns + right


def _mix(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a good 64-bit hash of one word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class BlockOrder:
    """For each epoch an order of all blocks, a pure function of (seed, dataset, epoch, window).

    Args:
        blocks_of_shard: blocks in each shard, at least one in all.
        seed: any integer.
        window: blocks permuted together; None: all.
        fingerprint: of the dataset, so that two datasets have different orders.
    """

    def __init__(
        self,
        blocks_of_shard: Sequence[int] | IntArray,
        seed: int,
        *,
        window: int | None = None,
        fingerprint: str = "",
    ) -> None:
        self._blocks_of_shard = np.asarray(blocks_of_shard, dtype=np.int64)
        self._begin_of_shard = np.cumsum(self._blocks_of_shard) - self._blocks_of_shard
        self.num_blocks = int(self._blocks_of_shard.sum())
        assert self.num_blocks >= 1
        self.window = min(window or self.num_blocks, self.num_blocks)
        self._key = f"sedd_scale block order 2|{seed}|{fingerprint}"
        self._epoch: tuple[int, IntArray, IntArray] | None = None
        self._windows: dict[tuple[int, int, int], Permutation] = {}
        self._run: tuple[int, IntArray] = (-1, np.empty(0, dtype=np.int64))

    def block_of_sample(self, sample_ids: npt.ArrayLike) -> IntArray:
        """The block that each sample of the run reads; int64, the shape of `sample_ids`."""
        samples = np.asarray(sample_ids, dtype=np.int64)
        run, places = np.divmod(samples, RUN)
        if not samples.size or (run != run.flat[0]).any():
            return self._blocks(samples, attempt=0)
        # A few samples take as long as many, and the next batches are likely to be of this run.
        first = int(run.flat[0])
        kept = self._run
        if kept[0] != first:
            kept = (first, self._blocks(first * RUN + np.arange(RUN), attempt=0))
            self._run = kept
        return kept[1][places]

    def substitutes(self, sample_ids: IntArray, *, attempt: int, epochs_off: int) -> IntArray:
        """Other blocks for these samples, of the same window where `epochs_off` is 0.

        Args:
            attempt: from 1; each one gives other blocks.
            epochs_off: as if the samples came this many epochs later.
        """
        return self._blocks(sample_ids + epochs_off * self.num_blocks, attempt=attempt)

    def _blocks(self, samples: IntArray, *, attempt: int) -> IntArray:
        assert np.all(samples >= 0)
        epochs, places = np.divmod(samples, self.num_blocks)
        windows = places // self.window
        blocks = np.empty_like(places)
        for epoch, window in {*zip(epochs.ravel().tolist(), windows.ravel().tolist())}:
            here = (epochs == epoch) & (windows == window)
            begin = window * self.window
            within = self._permutation(epoch, window, attempt)(places[here] - begin)
            blocks[here] = self._block_in_row(epoch, begin + within)
        return blocks

    def shards_of_window(self, sample: int, *, ahead: int = 0) -> IntArray:
        """The shards that the window of a sample reads, or the one `ahead` windows later."""
        epoch, place = divmod(sample, self.num_blocks)
        per_epoch = -(-self.num_blocks // self.window)
        epoch, window = divmod(epoch * per_epoch + place // self.window + ahead, per_epoch)
        shards, ends = self._row(epoch)
        begin = window * self.window
        last = min(begin + self.window, self.num_blocks) - 1
        first_shard, last_shard = np.searchsorted(ends, [begin, last], side="right")
        return shards[first_shard : last_shard + 1]

    def _permutation(self, epoch: int, window: int, attempt: int) -> Permutation:
        permutation = self._windows.get((epoch, window, attempt))
        if permutation is None:
            size = min(self.window, self.num_blocks - window * self.window)
            permutation = Permutation(size, f"{self._key}|window|{epoch}|{window}|{attempt}")
            if len(self._windows) > 64:
                self._windows = {}
            self._windows[epoch, window, attempt] = permutation
        return permutation

    def _row(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The shards of an epoch in their order, and where each ends; the last epoch's are kept."""
        kept = self._epoch
        if kept is None or kept[0] != epoch:
            number = len(self._blocks_of_shard)
            shards = Permutation(number, f"{self._key}|shards|{epoch}")(np.arange(number))
            kept = (epoch, shards, np.cumsum(self._blocks_of_shard[shards]))
            self._epoch = kept
        return kept[1], kept[2]

    def _block_in_row(self, epoch: int, places: IntArray) -> IntArray:
        shards, ends = self._row(epoch)
        at = np.searchsorted(ends, places, side="right")
        shard = shards[at]
        return self._begin_of_shard[shard] + places - (ends[at] - self._blocks_of_shard[shard])
