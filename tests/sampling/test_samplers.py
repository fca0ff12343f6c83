"""Samplers against the exact law of their chain, which comes from the steps' probability tables."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.sampling import SAMPLERS
from sedd_scale.sampling.samplers import T_END, sample
from tests.evaluation.enumeration import all_states
from tests.sampling.exact_scores import ExactScores, chain_law

GRAPHS = ("absorb", "uniform")
COUNT = 6000


def draw(model: ExactScores, steps: int, sampler: str, fixed: dict[int, int], count: int) -> Tensor:
    tokens_BL = torch.zeros(count, model.length, dtype=torch.int64)
    fixed_BL = torch.zeros(count, model.length, dtype=torch.bool)
    for place, token in fixed.items():
        tokens_BL[:, place] = token
        fixed_BL[:, place] = True
    return sample(model, tokens_BL, fixed_BL, steps, sampler, seed=5)


@pytest.mark.parametrize("fixed", [{}, {1: 2}])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("steps", [1, 3])
def test_samples_follow_the_chain_of_the_tables(
    graph: str, sampler: str, steps: int, fixed: dict[int, int]
) -> None:
    model = ExactScores(graph, "loglinear")
    law_S = chain_law(model, steps, sampler, T_END, fixed)
    samples_BL = draw(model, steps, sampler, fixed, COUNT)
    place_value = model.graph.num_states ** torch.arange(model.length - 1, -1, -1)
    counts_S = torch.bincount((samples_BL * place_value).sum(1), minlength=len(law_S))
    possible = law_S > 1e-12
    assert counts_S[~possible].sum() == 0
    found, expected = counts_S[possible].double(), law_S[possible] * COUNT
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert stats.chi2.sf(statistic, int(possible.sum()) - 1) > 1e-3


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_chain_approaches_the_data_with_more_steps(
    graph: str, sampler: str, noise: str
) -> None:
    model = ExactScores(graph, noise)
    data_S = torch.zeros(model.graph.num_states**model.length, dtype=torch.float64)
    states_SL = all_states(model.graph.num_states, model.length)
    data_S[(states_SL < model.graph.num_tokens).all(1)] = model.data_C
    distance = [
        (chain_law(model, steps, sampler, T_END, {}) - data_S).abs().sum().item() / 2
        for steps in (8, 64, 256)
    ]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 0.02


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_sample_is_the_same_in_any_company(graph: str) -> None:
    model = ExactScores(graph, "loglinear")
    blank = torch.zeros(12, 2, dtype=torch.int64)
    free = torch.zeros(12, 2, dtype=torch.bool)
    whole = sample(model, blank, free, 5, seed=9)
    ids = [7, 0, 11]
    some = sample(model, blank[ids], free[ids], 5, seed=9, sample_ids_B=ids)
    assert torch.equal(some, whole[ids])
    mixed = sample(model, blank[:2], free[:2], 5, seed=[9, 4], sample_ids_B=[3, 3])
    assert torch.equal(mixed[0], whole[3])
    assert not torch.equal(sample(model, blank, free, 5, seed=10), whole)


def test_a_generator_gives_the_seed() -> None:
    model = ExactScores("absorb", "loglinear")
    blank = torch.zeros(20, 2, dtype=torch.int64)
    free = torch.zeros(20, 2, dtype=torch.bool)
    first, again, other = (
        sample(model, blank, free, 4, "analytic", torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_scaled_logits_give_the_same_samples() -> None:
    blank = torch.zeros(50, 2, dtype=torch.int64)
    free = torch.zeros(50, 2, dtype=torch.bool)
    for sampler in SAMPLERS:
        plain, scaled = (
            sample(ExactScores("absorb", "loglinear", scaled=scaled), blank, free, 6, sampler)
            for scaled in (False, True)
        )
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("graph", GRAPHS)
def test_fixed_tokens_stay_and_no_mask_is_left(graph: str) -> None:
    model = ExactScores(graph, "loglinear")
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(3, (40, 2), generator=generator)
    fixed_BL = torch.rand(40, 2, generator=generator) < 0.5
    samples_BL = sample(model, tokens_BL, fixed_BL, 4)
    assert torch.equal(samples_BL[fixed_BL], tokens_BL[fixed_BL])
    assert (samples_BL < 3).all() and (samples_BL >= 0).all()


def test_no_network_call_where_nothing_is_left_to_draw() -> None:
    model = ExactScores("absorb", "loglinear")
    tokens_BL = torch.zeros(4, 2, dtype=torch.int64)
    sample(model, tokens_BL, torch.ones(4, 2, dtype=torch.bool), 10)
    assert model.calls == 0
    sample(model, tokens_BL[:1], torch.zeros(1, 2, dtype=torch.bool), 200)
    assert 1 <= model.calls < 200


def test_what_cannot_be_sampled_is_refused() -> None:
    model = ExactScores("absorb", "loglinear")
    blank, free = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="sampler 'gumbel' is unknown"):
        sample(model, blank, free, 4, "gumbel")
    with pytest.raises(ConfigError, match="steps=0"):
        sample(model, blank, free, 0)
    with pytest.raises(DataError, match="equal shapes"):
        sample(model, blank, free[:1], 4)
    with pytest.raises(DataError, match="token id 3 is outside"):
        sample(model, blank + 3, ~free, 4)
    model.data_C[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        sample(model, blank, free, 4)
