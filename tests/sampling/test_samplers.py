"""Samplers against the exact law of their chain, which comes from the steps' probability tables."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from sedd_scale.diffusion.score_entropy import mean_log_scores
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.sampling import SAMPLERS, samplers_of
from sedd_scale.sampling.keyed_draws import KeyedDraws
from sedd_scale.sampling.samplers import draw, run_batch, start_batch
from sedd_scale.sampling.settings import T_END, SamplerSettings
from sedd_scale.sampling.token_law import TokenLaw
from tests.evaluation.enumeration import all_states, tiny_model
from tests.sampling.exact_scores import (
    ExactScores,
    RandomScores,
    TimedScores,
    chain_law,
    hitting_law,
    order_law,
)

GRAPHS = ("absorb", "uniform")
COUNT = 6000
GRID_SAMPLERS = [(graph, name) for graph in GRAPHS for name in samplers_of("uniform")]
GRID_SAMPLERS.append(("absorb", "ancestral"))


def assert_follows(samples_BL: Tensor, law_S: Tensor, num_states: int) -> None:
    """Chi-square of samples against the probability of every sequence."""
    place_value = num_states ** torch.arange(samples_BL.shape[1] - 1, -1, -1)
    counts_S = torch.bincount((samples_BL * place_value).sum(1), minlength=len(law_S))
    possible = law_S > 1e-12
    assert counts_S[~possible].sum() == 0
    found, expected = counts_S[possible].double(), law_S[possible] * len(samples_BL)
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert stats.chi2.sf(statistic, int(possible.sum()) - 1) > 1e-3


def drawn_around(
    model: ExactScores, steps: int, sampler: str, fixed: dict[int, int], count: int
) -> Tensor:
    tokens_BL = torch.zeros(count, model.length, dtype=torch.int64)
    fixed_BL = torch.zeros(count, model.length, dtype=torch.bool)
    for place, token in fixed.items():
        tokens_BL[:, place] = token
        fixed_BL[:, place] = True
    return draw(model, tokens_BL, fixed_BL, SamplerSettings(sampler, steps=steps), seed=5)


@pytest.mark.parametrize("fixed", [{}, {1: 2}])
@pytest.mark.parametrize("graph, sampler", GRID_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_samples_follow_the_chain_of_the_tables(
    graph: str, sampler: str, steps: int, fixed: dict[int, int]
) -> None:
    model = ExactScores(graph, "loglinear")
    law_S = chain_law(model, steps, sampler, T_END, fixed)
    samples_BL = drawn_around(model, steps, sampler, fixed, COUNT)
    assert_follows(samples_BL, law_S, model.graph.num_states)


@pytest.mark.parametrize("sampler", ["analytic", "euler", "ancestral"])
def test_any_scores_give_the_chain_of_the_tables(sampler: str) -> None:
    model = RandomScores("absorb", "loglinear")
    law_S = chain_law(model, 3, sampler, T_END, {})
    assert_follows(drawn_around(model, 3, sampler, {}, COUNT), law_S, 4)


@pytest.mark.parametrize("remask", [0.5, 4.0])
def test_remasking_follows_its_tables(remask: float) -> None:
    model = RandomScores("absorb", "cosine")
    law_S = chain_law(model, 4, "ancestral", T_END, {}, remask=remask)
    blank, free = torch.zeros(COUNT, 3, dtype=torch.int64), torch.zeros(COUNT, 3).bool()
    samples = draw(model, blank, free, SamplerSettings("ancestral", steps=4, remask=remask))
    assert_follows(samples, law_S, 4)


def test_remasking_approaches_the_data_too() -> None:
    model = ExactScores("absorb", "loglinear")
    data_S = torch.zeros(16, dtype=torch.float64)
    data_S[(all_states(4, 2) < 3).all(1)] = model.data_C
    distance = [
        (chain_law(model, steps, "ancestral", T_END, {}, remask=1.0) - data_S).abs().sum().item()
        for steps in (8, 64, 256)
    ]
    assert distance[0] > distance[1] > distance[2] and distance[2] < 0.04


@pytest.mark.parametrize(
    "sampler", [name for name in samplers_of("absorb") if SAMPLERS[name].steps is None]
)
@pytest.mark.parametrize("steps", [None, 2])
def test_chosen_positions_follow_the_walk_over_all_orders(sampler: str, steps: int | None) -> None:
    """One position a call, or the groups that so many steps make of three positions."""
    model = RandomScores("absorb", "loglinear")
    blank, free = torch.zeros(COUNT, 3, dtype=torch.int64), torch.zeros(COUNT, 3).bool()
    batch = start_batch(model, blank, free, SamplerSettings(sampler, steps=steps))
    run_batch(batch)
    groups = (1, 1, 1)
    if steps is not None:
        groups = (1, 2) if sampler == "first-hitting" else (2, 1)
    assert_follows(batch.state_BL, order_law(model, sampler, groups), 3)
    assert batch.outputs.calls == len(groups)


def test_first_hitting_follows_a_law_that_changes_with_time() -> None:
    model = TimedScores("absorb", "loglinear", length=2)
    blank, free = torch.zeros(4 * COUNT, 2, dtype=torch.int64), torch.zeros(4 * COUNT, 2).bool()
    law_S = hitting_law(model)
    assert float(law_S.sum()) == pytest.approx(1.0, abs=1e-12)
    samples_BL = draw(model, blank, free, SamplerSettings("first-hitting"), seed=2)
    assert_follows(samples_BL, law_S, 3)
    with pytest.raises(AssertionError):  # of the time that all have at the start
        assert_follows(samples_BL, order_law(model, "first-hitting", (1, 1)), 3)


def test_draws_in_single_precision_follow_the_law_down_to_its_tail() -> None:
    model = ExactScores("absorb", "loglinear")
    blank, free = torch.zeros(COUNT, 2, dtype=torch.int64), torch.zeros(COUNT, 2).bool()
    samples_BL = draw(model, blank, free, SamplerSettings(steps=3, draw_dtype="float32"))
    assert_follows(samples_BL, chain_law(model, 3, "analytic", T_END, {}), 4)
    # Of a token with a chance of 2^-26 only a number of more than 24 bits can tell.
    logits = torch.tensor([[0.0, -26 * math.log(2.0)]], dtype=torch.float64)
    for draw_dtype, drawn in (("float64", 1), ("float32", 0)):
        law = TokenLaw(SamplerSettings(draw_dtype=draw_dtype))
        draws = KeyedDraws([0], [0], length=1, device=model.device, dtype=law.dtype)
        uniform = draws.rounded(torch.tensor([1 - 2.0**-28], dtype=torch.float64))
        assert int(law.draw(logits, uniform)) == drawn


def test_first_hitting_draws_the_data_itself() -> None:
    model = ExactScores("absorb", "geometric")
    blank, free = torch.zeros(COUNT, 2, dtype=torch.int64), torch.zeros(COUNT, 2).bool()
    assert_follows(
        draw(model, blank[:500], free[:500], SamplerSettings("first-hitting")), model.data_C, 3
    )


def test_temperature_and_cuts_are_those_of_their_definition() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 2.9, -5.0]])

    def law(**options: float) -> Tensor:
        weights = TokenLaw(SamplerSettings(**options)).weights(logits)  # type: ignore[arg-type]
        return weights / weights.sum(1, keepdim=True)

    full = torch.softmax(logits.double() / 0.5, 1)
    torch.testing.assert_close(law(temperature=0.5), full)
    two = torch.where(full >= full.sort(1, descending=True).values[:, 1:2], full, 0.0)
    torch.testing.assert_close(law(temperature=0.5, top_k=2), two / two.sum(1, keepdim=True))
    # 0.64 and 0.24 of the first row reach 0.8, of the second 0.51 and 0.46.
    plain = torch.softmax(logits.double(), 1)
    two = torch.where(plain >= plain.sort(1, descending=True).values[:, 1:2], plain, 0.0)
    torch.testing.assert_close(law(top_p=0.8), two / two.sum(1, keepdim=True))
    greedy = TokenLaw(SamplerSettings(temperature=0)).draw(logits, torch.tensor([0.9, 0.9]))
    assert greedy.tolist() == [0, 1]


@pytest.mark.parametrize("sampler", samplers_of("absorb"))
def test_every_sampler_keeps_what_is_given_in_ragged_batches(sampler: str) -> None:
    """A network's samples of three lengths are the same alone and in one padded batch."""
    model = tiny_model("absorb", "loglinear", num_tokens=9, block_length=8)
    tokens = torch.arange(24).view(3, 8) % 9
    fixed = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0], [0] * 7 + [1]]).bool()
    lengths = [8, 5, 3]
    settings = SamplerSettings(sampler, steps=3)
    whole = draw(model, tokens, fixed, settings, seed=4, lengths_B=lengths)
    assert torch.equal(whole[fixed], tokens[fixed]) and int(whole.max()) < 9
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        alone = draw(
            model,
            tokens[part, :length],
            fixed[part, :length],
            settings,
            seed=4,
            sample_ids_B=[row],
        )
        assert torch.equal(alone[0], whole[row, :length])
        assert torch.equal(whole[row, length:], tokens[row, length:])


def test_without_time_conditioning_an_unchanged_batch_needs_no_call() -> None:
    model = RandomScores("absorb", "loglinear")
    blank, free = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3).bool()
    for sampler in ("analytic", "ancestral"):
        batch = start_batch(model, blank, free, SamplerSettings(sampler, steps=300))
        run_batch(batch)
        assert 1 <= batch.outputs.calls <= 3
    # With time conditioning too where moves are the schedule's alone.
    batch = start_batch(
        ExactScores("absorb", "loglinear"),
        blank[:, :2],
        free[:, :2],
        SamplerSettings("ancestral", steps=300),
    )
    run_batch(batch)
    assert batch.outputs.calls <= 2


@pytest.mark.parametrize("time_grid", ["cosine", "schedule"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_other_grids_end_without_masks(graph: str, time_grid: str) -> None:
    model = ExactScores(graph, "geometric")
    blank, free = torch.zeros(400, 2, dtype=torch.int64), torch.zeros(400, 2).bool()
    samples = draw(model, blank, free, SamplerSettings(steps=64, time_grid=time_grid))
    found = torch.bincount(samples[:, 0] * 3 + samples[:, 1], minlength=9) / 400
    assert (found - model.data_C).abs().sum() / 2 < 0.15


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
@pytest.mark.parametrize("graph, sampler", GRID_SAMPLERS)
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
    whole = draw(model, blank, free, SamplerSettings(steps=5), seed=9)
    ids = [7, 0, 11]
    some = draw(model, blank[ids], free[ids], SamplerSettings(steps=5), seed=9, sample_ids_B=ids)
    assert torch.equal(some, whole[ids])
    mixed = draw(
        model, blank[:2], free[:2], SamplerSettings(steps=5), seed=[9, 4], sample_ids_B=[3, 3]
    )
    assert torch.equal(mixed[0], whole[3])
    assert not torch.equal(draw(model, blank, free, SamplerSettings(steps=5), seed=10), whole)


def test_scaled_logits_give_the_same_samples() -> None:
    blank = torch.zeros(50, 2, dtype=torch.int64)
    free = torch.zeros(50, 2, dtype=torch.bool)
    for sampler in ("analytic", "euler", "ancestral"):
        plain, scaled = (
            draw(
                ExactScores("absorb", "loglinear", scaled=scaled),
                blank,
                free,
                SamplerSettings(sampler, steps=6),
            )
            for scaled in (False, True)
        )
        assert torch.equal(plain, scaled)


def test_laws_of_clean_tokens_give_the_same_samples() -> None:
    """Of the true law given all other positions the true scores follow (mean parametrisation)."""
    blank = torch.zeros(50, 2, dtype=torch.int64)
    free = torch.zeros(50, 2, dtype=torch.bool)
    known, told = (ExactScores("uniform", "loglinear", mean=mean) for mean in (False, True))
    state_BL, sigma_B = torch.tensor([[0, 2], [1, 1]]), torch.tensor([0.1, 2.0])
    own_R = state_BL.flatten()
    expected = known.logits(state_BL, sigma_B, torch.arange(4))
    logits = told.logits(state_BL, sigma_B, torch.arange(4))
    found = mean_log_scores(logits, own_R, sigma_B.repeat_interleave(2))
    torch.testing.assert_close(
        found.scatter(1, own_R[:, None], 0.0), expected.scatter(1, own_R[:, None], 0.0)
    )
    for sampler in ("analytic", "euler"):
        assert torch.equal(
            *(
                draw(model, blank, free, SamplerSettings(sampler, steps=6))
                for model in (known, told)
            )
        )


@pytest.mark.parametrize("sampler", ["analytic", "euler", "ancestral"])
def test_normalised_scores_of_masks_follow_the_chain_of_the_tables(sampler: str) -> None:
    """q_y / (e^sigma - 1), with the true laws of clean tokens at any constant of a row."""
    model = ExactScores("absorb", "loglinear", mean=True)
    for fixed in ({}, {1: 2}):
        law_S = chain_law(model, 3, sampler, T_END, fixed)
        assert_follows(drawn_around(model, 3, sampler, fixed, COUNT), law_S, 4)
    state_BL, sigma_B = torch.tensor([[3, 2], [3, 3]]), torch.tensor([0.1, 2.0]).double()
    logits = model.logits(state_BL, sigma_B, torch.arange(4)).view(2, 2, 3)
    padding = torch.zeros(2, 2, 1, dtype=torch.float64)
    found = model.law.log_scores(torch.cat([logits, padding], 2), state_BL, sigma_B)
    masked = state_BL == 3
    expected = model.log_scores(state_BL, sigma_B)[masked][:, :3]
    torch.testing.assert_close(found[masked][:, :3], expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_fixed_tokens_stay_and_no_mask_is_left(graph: str) -> None:
    model = ExactScores(graph, "loglinear")
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(3, (40, 2), generator=generator)
    fixed_BL = torch.rand(40, 2, generator=generator) < 0.5
    samples_BL = draw(model, tokens_BL, fixed_BL, SamplerSettings(steps=4))
    assert torch.equal(samples_BL[fixed_BL], tokens_BL[fixed_BL])
    assert (samples_BL < 3).all() and (samples_BL >= 0).all()


def test_no_network_call_where_nothing_is_left_to_draw() -> None:
    model = ExactScores("absorb", "loglinear")
    tokens_BL = torch.zeros(4, 2, dtype=torch.int64)
    draw(model, tokens_BL, torch.ones(4, 2, dtype=torch.bool), SamplerSettings(steps=10))
    assert model.calls == 0
    draw(model, tokens_BL[:1], torch.zeros(1, 2, dtype=torch.bool), SamplerSettings(steps=200))
    assert 1 <= model.calls < 200


def test_what_cannot_be_sampled_is_refused() -> None:
    model = ExactScores("absorb", "loglinear")
    blank, free = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="sampler 'gumbel' is unknown"):
        draw(model, blank, free, SamplerSettings("gumbel", steps=4))
    for match, options in (
        ("remask=1.0 does not go with", {"remask": 1.0}),
        ("top_p=1.5", {"top_p": 1.5}),
        ("temperature=-1", {"temperature": -1}),
        ("time_grid 'log' is unknown", {"time_grid": "log"}),
        ("temperature=0 takes", {"temperature": 0, "top_k": 3}),
    ):
        with pytest.raises(ConfigError, match=match):
            draw(model, blank, free, SamplerSettings(steps=4, **options))
    uniform = ExactScores("uniform", "loglinear")
    with pytest.raises(ConfigError, match="sampler margin does not go with a diffusion"):
        draw(uniform, blank, free, SamplerSettings("margin", steps=4))
    with pytest.raises(ConfigError, match="top_k=2 does not go with sampler analytic of"):
        draw(uniform, blank, free, SamplerSettings(steps=4, top_k=2))
    with pytest.raises(ConfigError, match="steps=0"):
        draw(model, blank, free, SamplerSettings(steps=0))
    with pytest.raises(DataError, match="equal shapes"):
        draw(model, blank, free[:1], SamplerSettings(steps=4))
    with pytest.raises(DataError, match="token id 3 is outside"):
        draw(model, blank + 3, ~free, SamplerSettings(steps=4))
    model.data_C[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        draw(model, blank, free, SamplerSettings(steps=4))
