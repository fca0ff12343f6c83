"""Order: a permutation per epoch, the same for every layout, well mixed, free of state."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.data.joint_reader import spread_blocks
from sedd_scale.data.loader import TrainLoader
from sedd_scale.data.order import BlockOrder
from sedd_scale.data.prefetcher import Prefetcher
from sedd_scale.data.shards import BlockReader, Dataset
from tests.datasets import dataset_of_words


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> BlockReader:
    path = tmp_path_factory.mktemp("loader") / "d"
    return Dataset(dataset_of_words(path, 40, block_length=64, blocks_per_shard=50)).reader("train")


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 7, 16, 97, 1000, 65_537])
def test_each_epoch_is_a_permutation(num_blocks: int) -> None:
    order = BlockOrder([num_blocks], 7)
    for epoch in (0, 1, 12):
        samples = np.arange(num_blocks) + epoch * num_blocks
        assert np.array_equal(np.sort(order.block_of_sample(samples)), np.arange(num_blocks))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    samples = np.arange(3000)
    blocks = BlockOrder([1000], 1).block_of_sample(samples)
    assert np.array_equal(blocks, BlockOrder([1000], 1).block_of_sample(samples))
    others = [
        blocks[1000:2000],
        blocks[2000:],
        BlockOrder([1000], 2).block_of_sample(samples[:1000]),
    ]
    for other in others:
        # Two random permutations of 1000 agree in about one place.
        assert (other == blocks[:1000]).sum() < 8


def test_any_part_in_any_order_gives_the_same() -> None:
    order = BlockOrder([1000], 3)
    whole = order.block_of_sample(np.arange(5000))
    chosen = np.random.default_rng(0).permutation(5000)[:777]
    assert np.array_equal(BlockOrder([1000], 3).block_of_sample(chosen), whole[chosen])


@pytest.mark.parametrize("num_blocks", [4, 6, 35])
def test_every_block_is_equally_likely_everywhere(num_blocks: int) -> None:
    epochs = 3000
    order = BlockOrder([num_blocks], 0)
    samples = np.arange(num_blocks * epochs).reshape(epochs, num_blocks)
    table = np.stack([order.block_of_sample(row) for row in samples])
    counts = np.stack([(table == block).sum(0) for block in range(num_blocks)])
    expected = epochs / num_blocks
    # Each cell is binomial; 5 standard deviations over at most 1,225 cells.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    # Of a pair of neighbours either comes first equally often.
    first = table.argmin(1) < np.where(table == 1)[1]
    assert abs(first.mean() - 0.5) < 5 * 0.5 / np.sqrt(epochs)


def test_neighbours_are_torn_apart() -> None:
    num_blocks = 100_000
    blocks = BlockOrder([num_blocks], 5).block_of_sample(np.arange(num_blocks))
    assert abs(np.corrcoef(np.arange(num_blocks), blocks)[0, 1]) < 0.02
    assert abs(np.corrcoef(blocks[:-1], blocks[1:])[0, 1]) < 0.02
    steps = np.diff(blocks)
    # Differences of random permutations hardly repeat; those of a linear map all do.
    assert np.unique(steps, return_counts=True)[1].max() < 15


def test_a_billion_blocks_cost_nothing() -> None:
    order = BlockOrder([1_000_000_007], 1)
    samples = np.arange(999_990_000, 1_000_010_000)
    start = time.perf_counter()
    blocks = order.block_of_sample(samples)
    assert time.perf_counter() - start < 1
    assert len(np.unique(blocks[:10_007])) == 10_007
    assert blocks.min() >= 0 and blocks.max() < 1_000_000_007


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_together_read_the_global_batch(reader: BlockReader, ranks: int) -> None:
    whole = TrainLoader(reader, seed=1, global_batch=12)
    for step in (0, 3, 40):
        tokens = whole.batch(step, np.arange(12))
        parts = []
        for rank in range(ranks):
            own = TrainLoader(reader, seed=1, global_batch=12)
            positions = np.arange(12).reshape(ranks, -1)[rank]
            parts.append(np.concatenate([own.batch(step, [one]) for one in positions]))
        assert np.array_equal(np.concatenate(parts), tokens)


def test_each_block_once_per_epoch(reader: BlockReader) -> None:
    loader = TrainLoader(reader, seed=1, global_batch=10)
    num_blocks = len(reader)
    samples = np.concatenate([loader.sample_ids(step, range(10)) for step in range(num_blocks)])
    assert np.array_equal(samples, np.arange(10 * num_blocks))
    counts = np.bincount(loader.orders[0].block_of_sample(samples))
    assert np.array_equal(counts, np.full(num_blocks, 10))


def test_a_batch_larger_than_the_data_runs_on(reader: BlockReader) -> None:
    size = 2 * len(reader) + 1
    loader = TrainLoader(reader, seed=1, global_batch=size)
    blocks = loader.orders[0].block_of_sample(loader.sample_ids(0, range(size)))
    assert set(np.bincount(blocks)) <= {2, 3}
    assert loader.batch(0, range(size)).shape == (size, 64)


def test_spread_blocks() -> None:
    assert spread_blocks(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread_blocks(3, 8).tolist() == [0, 1, 2]
    assert spread_blocks(0, 8).tolist() == []


def test_prefetcher_keeps_order_and_runs_ahead() -> None:
    made: list[int] = []
    ready = threading.Event()

    def produce(step: int) -> int:
        made.append(step)
        if step == 7:
            ready.set()
        return step * step

    with Prefetcher(produce, 5, end_step=10, ahead=3) as items:
        assert ready.wait(10), "three items are made before the first is asked for"
        assert made == [5, 6, 7]
        assert list(items) == [25, 36, 49, 64, 81]
    with Prefetcher(produce, 0, end_step=0) as items:
        assert list(items) == []


def test_prefetcher_raises_where_the_item_was_due() -> None:
    def produce(step: int) -> int:
        if step == 2:
            raise ValueError("step 2")
        return step

    before = threading.active_count()
    with Prefetcher(produce) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(ValueError, match="step 2"):
            next(items)
    assert threading.active_count() == before


def test_prefetcher_closes_with_items_waiting() -> None:
    before = threading.active_count()
    items = Prefetcher(lambda step: step, ahead=4)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before


def test_loader_starts_anywhere_at_once(reader: BlockReader, tmp_path: Path) -> None:
    start = time.perf_counter()
    tokens = TrainLoader(reader, seed=1, global_batch=8).batch(10**12, range(8))
    assert tokens.shape == (8, 64)
    assert time.perf_counter() - start < 1
