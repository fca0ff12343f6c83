"""The order of training: batch k holds the same blocks on any number of ranks, and costs no state.

Samples are counted from 0 over the whole run. Sample s belongs to epoch s // num_blocks, and within
an epoch a permutation keyed by (seed, epoch) names its block, so the only state of the data is how
many samples were consumed. The permutation is computed per sample, never stored: a run may start at
sample 10^9 as fast as at 0.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from sedd_scale.data.shards import BlockReader
from sedd_scale.errors import DataError

NUM_ROUNDS = 6

IntArray = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
Item = TypeVar("Item")


class BlockOrder:
    """For each epoch a permutation of 0..num_blocks-1, a pure function of (seed, epoch).

    Numbers are written as (left, right) in mixed radix over a near-square grid, and each round adds
    to one half a keyed hash of the other: a generalised Feistel network (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002). Where the grid is larger than num_blocks, a
    result beyond it is permuted again until it falls inside ("cycle walking").

    Args:
        num_blocks: blocks per epoch, at least 1.
        seed: any integer.
    """

    def __init__(self, num_blocks: int, seed: int) -> None:
        assert num_blocks >= 1
        self.num_blocks = num_blocks
        self.seed = seed
        self._rows = _ceil_root(num_blocks)
        self._columns = -(-num_blocks // self._rows)
        self._keys_of_epoch: tuple[int, _Words] | None = None

    def block_of_sample(self, sample_ids: npt.ArrayLike) -> IntArray:
        """The block that each sample of the run reads; int64, the shape of `sample_ids`."""
        samples = np.asarray(sample_ids, dtype=np.int64)
        assert np.all(samples >= 0)
        epochs, places = np.divmod(samples, self.num_blocks)
        blocks = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            blocks[here] = self._permute(places[here], self._keys(int(epoch)))
        return blocks

    def _keys(self, epoch: int) -> _Words:
        """Two 64-bit keys per round; the last epoch's are kept."""
        kept = self._keys_of_epoch
        if kept is not None and kept[0] == epoch:
            return kept[1]
        name = f"sedd_scale block order 1|{self.seed}|{epoch}|{self.num_blocks}"
        digest = hashlib.shake_256(name.encode()).digest(16 * NUM_ROUNDS)
        keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._keys_of_epoch = (epoch, keys)
        return keys

    def _permute(self, places: IntArray, keys: _Words) -> IntArray:
        numbers = self._rounds(places.astype(np.uint64), keys)
        while (outside := numbers >= self.num_blocks).any():
            numbers[outside] = self._rounds(numbers[outside], keys)
        return numbers.astype(np.int64)

    def _rounds(self, numbers: _Words, keys: _Words) -> _Words:
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        left, right = np.divmod(numbers, columns)
        for turn in range(NUM_ROUNDS):
            left = (left + _mix(right ^ keys[2 * turn]) % rows) % rows
            right = (right + _mix(left ^ keys[2 * turn + 1]) % columns) % columns
        return left * columns + right


def _ceil_root(number: int) -> int:
    root = int(np.sqrt(number))
    while root * root < number:
        root += 1
    return root


def _mix(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a good 64-bit hash of one word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class TrainLoader:
    """The blocks of each global batch, or of any part of it.

    Step k (from 0) consists of the samples kB..kB+B-1, B the global batch. A data-parallel rank
    asks for the positions it needs; together the ranks read each sample once. A dataset smaller
    than a batch runs on into its next epoch.

    Args:
        reader: the training split.
        seed: of the order.
        global_batch: B, sequences per step.

    Raises:
        DataError: the split has no block.
    """

    def __init__(self, reader: BlockReader, *, seed: int, global_batch: int) -> None:
        if len(reader) == 0:
            raise DataError(
                f"{reader.dataset.path} ({reader.split}) holds no block: prepare it with more text "
                "or a shorter --block-length"
            )
        assert global_batch >= 1
        self.reader = reader
        self.global_batch = global_batch
        self.order = BlockOrder(len(reader), seed)

    def sample_ids(self, step: int, positions_B: npt.ArrayLike) -> IntArray:
        """The samples at these positions (0..B-1) of a step, counted from the start of the run."""
        positions = np.asarray(positions_B, dtype=np.int64)
        assert np.all((positions >= 0) & (positions < self.global_batch))
        return step * self.global_batch + positions

    def read_samples(self, sample_ids_B: npt.ArrayLike) -> IntArray:
        """The blocks of these samples; int64 [n, L]."""
        return self.reader.read(self.order.block_of_sample(sample_ids_B))

    def batch(self, step: int, positions_B: npt.ArrayLike) -> IntArray:
        """The blocks at these positions (0..B-1) of a step; int64 [n, L]."""
        return self.read_samples(self.sample_ids(step, positions_B))


def spread_blocks(num_blocks: int, wanted: int) -> IntArray:
    """At most `wanted` block numbers, evenly spread over a split; the same for every caller."""
    count = min(num_blocks, wanted)
    return np.arange(count, dtype=np.int64) * num_blocks // max(count, 1)


class Prefetcher(Generic[Item]):
    """Makes items of consecutive steps ahead of time in one background thread.

    `next(prefetcher)` gives `produce(first_step)`, then `produce(first_step + 1)` and so on. An
    exception in `produce` is raised by the `next` of its step. Use it in a `with`, or close it.

    Args:
        produce: makes the item of a step; called in the background, in order.
        first_step: the first step wanted.
        end_step: the step after the last one; None: without end.
        ahead: items in the making or waiting, at least 1.
    """

    def __init__(
        self,
        produce: Callable[[int], Item],
        first_step: int = 0,
        *,
        end_step: int | None = None,
        ahead: int = 2,
    ) -> None:
        assert ahead >= 1
        self._produce = produce
        self._next_step = first_step
        self._end_step = end_step
        self._pending: deque[Future[Item]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        for _ in range(ahead):
            self._ask()

    def _ask(self) -> None:
        if self._end_step is None or self._next_step < self._end_step:
            self._pending.append(self._thread.submit(self._produce, self._next_step))
            self._next_step += 1

    def __iter__(self) -> "Prefetcher[Item]":
        return self

    def __next__(self) -> Item:
        if not self._pending:
            raise StopIteration
        future = self._pending.popleft()
        item = future.result()
        self._ask()
        return item

    def close(self) -> None:
        """Drop what is waiting and end the thread, after the item now in the making."""
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
