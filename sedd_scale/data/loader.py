"""The order of training: batch k holds the same blocks on any number of ranks, and costs no state.

Samples are counted from 0 over the whole run. A sample belongs to one dataset of the mixture (see
mixture) and is that dataset's n-th sample; an epoch is one pass over its blocks, in an order that
is a pure function (see order). The only state of the data so is how many samples were consumed, and
which shards are skipped because they are damaged: a run may start at sample 10^9 as fast as at 0.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.data.joint_reader import JointReader, Shard
from sedd_scale.data.mixture import MixturePlan, Stage
from sedd_scale.data.order import BlockOrder
from sedd_scale.data.shards import BlockReader
from sedd_scale.errors import DataError

# Tries to find a whole shard in the same window, then in other epochs' orders.
TRIES_IN_WINDOW = 24
TRIES = 96
NEVER = np.iinfo(np.int64).max


class TrainLoader:
    """The blocks of each global batch, or of any part of it.

    Step k (from 0) consists of the samples kB..kB+B-1, B the global batch. A data-parallel rank
    asks for the positions it needs; together the ranks read each sample once. A dataset smaller
    than a batch runs on into its next epoch.

    Args:
        readers: the training split of the dataset, or of each dataset of a mixture.
        seed: of the order.
        global_batch: B, sequences per step.
        window: blocks shuffled together (see order); None: all.
        plan: which dataset each sample comes from; needed for more than one.

    Attributes:
        joint: the blocks of all readers as one row.
        skipped: the damaged shards whose blocks are replaced, each with the step from which on.

    Raises:
        DataError: a split has no block.
    """

    def __init__(
        self,
        readers: BlockReader | Sequence[BlockReader],
        *,
        seed: int,
        global_batch: int,
        window: int | None = None,
        plan: MixturePlan | None = None,
    ) -> None:
        self.readers = [readers] if isinstance(readers, BlockReader) else list(readers)
        for reader in self.readers:
            if len(reader) == 0:
                raise DataError(
                    f"{reader.dataset.location} ({reader.split}) holds no block: prepare it with "
                    "more text or a shorter --block-length"
                )
        assert global_batch >= 1
        self.plan = plan or MixturePlan([Stage(0, (1.0,))])
        assert self.plan.num_datasets == len(self.readers)
        self.global_batch = global_batch
        self.joint = JointReader(self.readers)
        self.block_length = self.joint.block_length
        self.orders = [
            BlockOrder(
                reader.blocks_of_shard, seed, window=window, fingerprint=reader.dataset.fingerprint
            )
            for reader in self.readers
        ]
        self.skipped: dict[Shard, int] = {}
        # The first sample for which each shard is skipped.
        self._skipped_from = [np.full(len(reader.shards), NEVER) for reader in self.readers]
        self._ahead: ThreadPoolExecutor | None = None
        self._asked: dict[Shard, Future[None]] = {}

    def sample_ids(self, step: int, positions_B: npt.ArrayLike) -> IntArray:
        """The samples at these positions (0..B-1) of a step, counted from the start of the run."""
        positions = np.asarray(positions_B, dtype=np.int64)
        assert np.all((positions >= 0) & (positions < self.global_batch))
        return step * self.global_batch + positions

    def places(self, sample_ids_B: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """The dataset and the block of each sample, with blocks of skipped shards replaced."""
        samples = np.asarray(sample_ids_B, dtype=np.int64)
        datasets, numbers = self.plan.assign(samples)
        blocks = np.empty_like(numbers)
        for dataset in range(len(self.readers)):
            here = datasets == dataset
            if here.any():
                blocks[here] = self._whole(dataset, samples[here], numbers[here])
        return datasets, blocks

    def read_samples(self, sample_ids_B: npt.ArrayLike) -> IntArray:
        """The blocks of these samples; int64 [n, L].

        Raises:
            BadShardError: a block's shard is damaged, and not among the skipped ones.
            DataError: a remote shard cannot be read.
        """
        samples = np.asarray(sample_ids_B, dtype=np.int64)
        datasets, blocks = self.places(samples)
        self._look_ahead(samples)
        return self.joint.read(self.joint.first_blocks[datasets] + blocks)

    def batch(self, step: int, positions_B: npt.ArrayLike) -> IntArray:
        """The blocks at these positions (0..B-1) of a step; int64 [n, L]."""
        return self.read_samples(self.sample_ids(step, positions_B))

    def epochs(self, num_samples: int) -> list[float]:
        """How often each dataset was passed over after the run's first samples."""
        given = self.plan.given(num_samples).tolist()
        return [count / order.num_blocks for count, order in zip(given, self.orders)]

    def skip(self, shards: Iterable[Shard], *, from_step: int) -> None:
        """From a step on replace the blocks of these shards by others; the same on all ranks.

        Each sample keeps its place and its dataset: only samples of these shards change, to blocks
        of the same window drawn by the same kind of pure function.

        Raises:
            DataError: nothing of a dataset is left.
        """
        # Another thread may be reading `skipped` for a checkpoint: it is replaced, not changed.
        self.skipped = {**self.skipped, **dict.fromkeys(shards, from_step)}
        for (dataset, shard), step in self.skipped.items():
            self._skipped_from[dataset][shard] = step * self.global_batch
        for reader, skipped_from in zip(self.readers, self._skipped_from):
            if (skipped_from < NEVER).all():
                raise DataError(
                    f"every training shard of {reader.dataset.location} is damaged: prepare it "
                    "again"
                )

    def _whole(self, dataset: int, samples: IntArray, numbers: IntArray) -> IntArray:
        """The blocks of samples that are a dataset's samples of these numbers."""
        order, reader = self.orders[dataset], self.readers[dataset]
        blocks = order.block_of_sample(numbers)
        skipped_from = self._skipped_from[dataset]
        if not self.skipped:
            return blocks
        for attempt in range(1, TRIES):
            bad = samples >= skipped_from[reader.shard_of_block(blocks)]
            if not bad.any():
                return blocks
            far = max(0, attempt - TRIES_IN_WINDOW)
            blocks[bad] = order.substitutes(numbers[bad], attempt=attempt, epochs_off=far)
        damaged = int((skipped_from < NEVER).sum())
        raise DataError(
            f"{reader.dataset.location}: {damaged} of {len(skipped_from)} shards are damaged, too "
            "many to continue: prepare it again"
        )

    def _look_ahead(self, samples: IntArray) -> None:
        """Have the shards of this window and the next one fetched in the background."""
        if not any(reader.dataset.is_remote for reader in self.readers) or not len(samples):
            return
        if self._ahead is None:
            self._ahead = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        given = self.plan.given(int(samples.max()))
        wanted: dict[Shard, None] = {}
        for ahead in (0, 1):
            for dataset, (reader, order) in enumerate(zip(self.readers, self.orders)):
                if reader.dataset.is_remote:
                    shards = order.shards_of_window(int(given[dataset]), ahead=ahead)
                    wanted |= dict.fromkeys((dataset, shard) for shard in shards.tolist())
        # A failure here is not lost: it comes up again when the shard is read.
        self._asked = {shard: asked for shard, asked in self._asked.items() if shard in wanted}
        for shard in wanted:
            if shard not in self._asked and shard not in self.skipped:
                fetch = self.readers[shard[0]].fetch
                self._asked[shard] = self._ahead.submit(fetch, shard[1])
