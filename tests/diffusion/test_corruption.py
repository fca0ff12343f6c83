"""Keyed draws: the same whoever asks, stratified over the batch, with the law's frequencies."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sedd_scale.diffusion.corruption import Draw, keyed_rows, keyed_uniforms, keyed_words
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.schedules import make_schedule
from sedd_scale.errors import DataError
from tests.diffusion.reference import corrupt_batch

T_MIN = 1e-3
PINNED_WORDS = [11391479076688084383, 12505657118273816013, 18326698819675237597]


def draw(ids, *, graph="absorb", step=7, seed=11, batch=8, stream="train", t_B=None, length=64):
    graph = make_graph(graph, 50)
    tokens = torch.arange(batch * length).reshape(batch, length) % 50
    return corrupt_batch(
        tokens[[i % batch for i in ids]],
        sample_ids_B=ids,
        step=step,
        seed=seed,
        global_batch=batch,
        graph=graph,
        schedule=make_schedule("loglinear"),
        t_min=T_MIN,
        t_B=t_B,
        stream=stream,
    )


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_a_sample_is_the_same_however_the_batch_is_split(graph):
    whole = draw(range(8), graph=graph)
    for split in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[6, 1], [3, 0, 7]]):
        for ids in split:
            for got, want in zip(draw(ids, graph=graph), whole, strict=True):
                assert torch.equal(got, want[ids])


@pytest.mark.parametrize("global_batch", [1, 2, 7, 512])
def test_each_stratum_holds_one_time(global_batch):
    first = 3 * global_batch  # ids of step 3 in one running count
    ids = torch.arange(first, first + global_batch)
    orders = []
    for step in range(4):
        t = Draw(5, step, ids, global_batch=global_batch).times(T_MIN)
        assert t.dtype == torch.float64 and (t >= T_MIN).all() and (t < 1).all()
        strata = torch.floor((t - T_MIN) / (1 - T_MIN) * global_batch).long()
        assert torch.equal(strata.sort().values, torch.arange(global_batch))
        orders.append(strata.tolist())
    if global_batch == 512:
        assert len({tuple(order) for order in orders}) == 4


def test_times_are_uniform_over_steps():
    t = torch.stack([Draw(1, s, [2], global_batch=4).times(0.0) for s in range(4000)])
    counts = torch.histc(t.float(), bins=20, min=0, max=1).double()
    assert ((counts - 200) ** 2 / 200).sum() < 60  # 19 degrees of freedom: probability 4e-6


def test_steps_seeds_samples_and_streams_draw_apart():
    base = draw(range(8))
    same = draw(range(8))
    assert all(torch.equal(a, b) for a, b in zip(base, same, strict=True))
    others = [draw(range(8), step=8), draw(range(8), seed=12), draw(range(8), stream="validation")]
    for other in others:
        assert not torch.equal(other.t_B, base.t_B)
        assert not torch.equal(other.noisy_BL, base.noisy_BL)
        assert not torch.equal(other.dropout_key_B, base.dropout_key_B)
    # Rows of one batch at one noise level: different masks from sample to sample.
    level = draw(range(8), t_B=torch.full((8,), 0.5, dtype=torch.float64))
    masks = {tuple(row.tolist()) for row in level.noisy_BL == 50}
    assert len(masks) == 8
    assert len(set(base.dropout_key_B.tolist())) == 8
    assert (base.dropout_key_B >= 0).all() and (base.dropout_key_B < 2**31).all()


def test_moves_and_tokens_are_independent_streams():
    """Correlated streams would bend the redrawn tokens: among moved ones they stay uniform."""
    level = torch.full((8,), 0.5, dtype=torch.float64)
    noisy = draw(range(8), graph="uniform", t_B=level, length=4000)
    changed = noisy.noisy_BL[noisy.noisy_BL != noisy.clean_BL]
    counts = torch.bincount(changed, minlength=50).double()
    expected = len(changed) / 50
    assert ((counts - expected) ** 2 / expected).sum() < 110  # 49 degrees: probability 1e-6


@pytest.mark.parametrize("name", ["absorb", "uniform"])
@pytest.mark.parametrize("noise", ["loglinear", "geometric", "cosine", "linear"])
def test_frequencies_follow_the_law(name, noise):
    graph, schedule = make_graph(name, 4), make_schedule(noise)
    t_B = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    clean = torch.tensor([[2], [0], [3]]).repeat(1, 20000)
    batch = corrupt_batch(
        clean,
        sample_ids_B=[0, 1, 2],
        step=0,
        seed=2,
        global_batch=3,
        graph=graph,
        schedule=schedule,
        t_min=T_MIN,
        t_B=t_B,
    )
    law = graph.transition_probabilities(clean[:, 0], schedule.sigma(t_B))
    for row, expected in zip(batch.noisy_BL, law * 20000, strict=True):
        counts = torch.bincount(row, minlength=graph.num_states).double()
        assert (counts[expected == 0] == 0).all()
        seen = expected > 0
        chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
        assert chi_square < 32  # at most 3 degrees of freedom: probability 5e-7


def test_noise_of_the_batch_is_the_schedule_at_its_times():
    batch, schedule = draw(range(8)), make_schedule("loglinear")
    assert torch.equal(batch.sigma_B, schedule.sigma(batch.t_B))
    assert torch.equal(batch.rate_B, schedule.rate(batch.t_B))
    assert torch.equal(batch.rate_over_expm1_B, 1 / batch.t_B)
    given = torch.linspace(0.1, 0.9, 8)
    assert torch.equal(draw(range(8), t_B=given).t_B, given.double())


def test_words_never_change():
    """Draws belong to a run as much as its data: no release of numpy or of this may change them."""
    words = keyed_words(3, seed=1, stream="train/moves", step=2, sample=3)
    assert words.dtype == np.uint64
    assert words.tolist() == PINNED_WORDS
    uniforms = keyed_uniforms(3, seed=1, stream="train/moves", step=2, sample=3)
    assert uniforms.tolist() == [(w >> 11) / 2**53 for w in PINNED_WORDS]
    assert (keyed_uniforms(100000, seed=1, stream="a", step=0) < 1).all()


@pytest.mark.parametrize("count", [1, 2, 7, 1024])
def test_rows_are_the_words_of_new_philox_generators(count):
    """However they are drawn: they are defined by numpy's own generator with this key, counter."""
    ids, seed, step = [5, 0, 2**40, 6], 2**63 - 1, 9
    settings = {"seed": seed, "stream": "train/moves", "step": step}
    rows = keyed_rows(count, sample_ids_B=ids, **settings)
    uniforms = Draw(seed, step, ids, global_batch=8).uniforms(count, "moves")
    name = int.from_bytes(hashlib.blake2b(b"train/moves", digest_size=8).digest(), "little")
    key = np.array([seed, name], dtype=np.uint64)
    for row, uniform_row, sample in zip(rows, uniforms, ids, strict=True):
        counter = np.array([0, 0, sample, step], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(count)
        assert row.tolist() == words.tolist()
        assert keyed_words(count, sample=sample, **settings).tolist() == words.tolist()
        assert uniform_row.tolist() == [(word >> 11) / 2**53 for word in words.tolist()]
    whole = np.random.Philox(key=key, counter=np.array([0, 0, 2**64 - 1, step], dtype=np.uint64))
    assert keyed_words(count, **settings).tolist() == whole.random_raw(count).tolist()
    assert keyed_rows(count, sample_ids_B=[], **settings).shape == (0, count)


def test_threads_draw_the_same():
    expected = draw(range(8), length=512)
    with ThreadPoolExecutor(4) as threads:
        for batch in threads.map(lambda _: draw(range(8), length=512), range(40)):
            assert torch.equal(batch.noisy_BL, expected.noisy_BL)
            assert torch.equal(batch.dropout_key_B, expected.dropout_key_B)


def test_refuses_tokens_of_another_vocabulary():
    with pytest.raises(DataError, match="token id 50 "):
        corrupt_batch(
            torch.tensor([[3, 50]]),
            sample_ids_B=[0],
            step=0,
            seed=0,
            global_batch=1,
            graph=make_graph("absorb", 50),
            schedule=make_schedule("loglinear"),
            t_min=T_MIN,
        )


def test_a_batch_takes_milliseconds():
    draw(range(8), length=1024)
    started = time.perf_counter()
    for step in range(5):
        draw(range(8), graph="uniform", step=step, length=1024)
    assert (time.perf_counter() - started) / 5 < 0.1
