"""Two-level order: exact, near-sequential, well mixed within its window, free of state."""

import time

import numpy as np
import pytest

from sedd_scale.data.order import BlockOrder, Permutation

SHARDS = [50, 50, 50, 50, 50, 50, 50, 13]
TOTAL = sum(SHARDS)
OF_BLOCK = np.repeat(np.arange(len(SHARDS)), SHARDS)


@pytest.mark.parametrize("window", [1, 7, 50, 64, 120, 362, 363, 10_000, None])
def test_each_epoch_has_each_block_once(window: int | None) -> None:
    order = BlockOrder(SHARDS, 3, window=window)
    for epoch in (0, 1, 12):
        blocks = order.block_of_sample(np.arange(TOTAL) + epoch * TOTAL)
        assert np.array_equal(np.sort(blocks), np.arange(TOTAL))


@pytest.mark.parametrize("window", [50, 64, 120])
def test_a_window_reads_few_shards_and_says_which(window: int) -> None:
    order = BlockOrder(SHARDS, 3, window=window)
    per_epoch = -(-TOTAL // window)
    for epoch in range(3):
        for number in range(per_epoch):
            begin = number * window
            samples = epoch * TOTAL + np.arange(begin, min(begin + window, TOTAL))
            shards = set(OF_BLOCK[order.block_of_sample(samples)].tolist())
            assert len(shards) <= -(-window // 50) + 2
            for sample in (samples[0], samples[-1]):
                assert set(order.shards_of_window(int(sample)).tolist()) == shards
            before = samples[0] - 1
            if before >= 0:
                assert set(order.shards_of_window(int(before), ahead=1).tolist()) == shards


def test_windows_are_random_inside_and_shards_among_themselves() -> None:
    shards, per_shard, window = 40, 100, 400
    order = BlockOrder([per_shard] * shards, 5, window=window)
    total = shards * per_shard
    epochs = 60
    place_of_shard = []
    correlations = []
    hits = np.zeros((window // 20, window // 20))
    for epoch in range(epochs):
        blocks = order.block_of_sample(np.arange(total) + epoch * total)
        for begin in range(0, total, window):
            inside = blocks[begin : begin + window]
            ranks = np.argsort(np.argsort(inside))
            correlations.append(np.corrcoef(ranks, np.arange(window))[0, 1])
            np.add.at(hits, (ranks // 20, np.arange(window) // 20), 1)
        first = np.unique(blocks // per_shard, return_index=True)[1]
        place_of_shard.append(first)
    # Rank correlations of random permutations have variance 1 / (window - 1) and mean 0.
    deviations = np.array(correlations) * np.sqrt(window - 1)
    assert abs(deviations.mean()) < 5 / np.sqrt(len(deviations))
    assert abs(deviations.var() - 1) < 0.25
    # Where a block of a window goes is uniform: chi-square over 400 cells, 19 x 19 free.
    expected = hits.sum() / hits.size
    chi_square = ((hits - expected) ** 2 / expected).sum()
    assert abs(chi_square - 361) < 5 * np.sqrt(2 * 361)
    # Shards come in another order each epoch.
    correlation = np.corrcoef(np.array(place_of_shard))
    assert np.abs(correlation[np.triu_indices(epochs, 1)]).mean() < 0.2


def test_a_wider_window_tears_neighbours_further_apart() -> None:
    distances = []
    for window in (50, 400, 4000):
        order = BlockOrder([50] * 80, 5, window=window)
        place = np.argsort(order.block_of_sample(np.arange(4000)))
        of_one_shard = np.arange(1, 4000) % 50 > 0
        distances.append(np.abs(np.diff(place))[of_one_shard].mean())
    # Two random places of a row of n are n / 3 apart.
    for distance, window in zip(distances, (50, 400, 4000), strict=True):
        assert abs(distance / (window / 3) - 1) < 0.25


def test_fingerprints_seeds_and_windows_make_other_orders() -> None:
    samples = np.arange(TOTAL)
    orders = [
        BlockOrder(SHARDS, seed, window=window, fingerprint=fingerprint).block_of_sample(samples)
        for seed, window, fingerprint in (
            (0, None, "a"),
            (0, None, "b"),
            (1, None, "a"),
            (0, 100, "a"),
        )
    ]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).mean() < 0.05


def test_the_billionth_block_costs_what_the_first_does() -> None:
    shards = np.full(70_000, 16_384)
    order = BlockOrder(shards, 1, window=262_144, fingerprint="x")
    for sample in (0, 10**9, 10**12):
        start = time.perf_counter()
        fresh = BlockOrder(shards, 1, window=262_144, fingerprint="x")
        blocks = fresh.block_of_sample(np.arange(sample, sample + 512))
        assert time.perf_counter() - start < 1
        assert np.array_equal(blocks, order.block_of_sample(np.arange(sample, sample + 512)))


def test_substitutes_come_from_the_same_window() -> None:
    order = BlockOrder(SHARDS, 3, window=100)
    samples = np.arange(100, 200)
    here = set(order.block_of_sample(samples).tolist())
    tried = [order.substitutes(samples, attempt=n, epochs_off=0) for n in (1, 2)]
    assert all(set(blocks.tolist()) == here for blocks in tried)
    assert (tried[0] == tried[1]).mean() < 0.1
    far = order.substitutes(samples, attempt=3, epochs_off=2)
    assert set(far.tolist()) != here


@pytest.mark.parametrize("size", [1, 2, 5, 97, 1000])
def test_permutation(size: int) -> None:
    found = Permutation(size, "key")(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))
