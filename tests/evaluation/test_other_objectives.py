"""Bounds and likelihoods of the other objectives where everything can be enumerated."""

import itertools
import math

import numpy as np
import pytest
import torch

from sedd_scale.diffusion.objectives import D3PMAbsorb
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.model.score_model import ScoreModel
from tests.evaluation.enumeration import (
    all_states,
    exact_diffusion_nats,
    exact_log_likelihoods,
    exact_reconstruction_nats,
    tiny_model,
)
from tests.tolerance import NETWORK

T_MIN = 1e-2
LENGTH = 3


def softmax_table(model: ScoreModel, states_SL: torch.Tensor, t: float) -> torch.Tensor:
    """log softmax of the logits at every position of every state at time t, [S, L, N] float64."""
    sigma = model.schedule.sigma(torch.tensor([t], dtype=torch.float64)).expand(len(states_SL))
    logits = model.logits(states_SL, sigma, torch.arange(states_SL.numel()))
    logits = logits.double().view(*states_SL.shape, -1)[..., : model.graph.num_tokens]
    return logits.log_softmax(-1)


def test_masked_cross_entropy_has_the_bound_of_its_normalised_scores() -> None:
    trained = tiny_model("absorb", "cosine", objective="masked_cross_entropy")
    scores = tiny_model("absorb", "cosine")  # the same weights, other objective
    blocks_nL = all_states(3, LENGTH)
    options = {"draws": 16, "t_min": T_MIN, "batch_size": 64, "seed": 3}
    bound = evaluate_bound(trained, blocks_nL, **options)
    of_scores = evaluate_bound(scores, blocks_nL, **options)
    assert bound.normalised is None and of_scores.normalised is not None
    assert of_scores.normalised.nats_per_token == pytest.approx(bound.nats_per_token, rel=NETWORK)
    assert of_scores.normalised.stderr == pytest.approx(bound.stderr, rel=1e-4)
    assert of_scores.nats_per_token > 1.01 * bound.nats_per_token

    exact_n = [
        exact_diffusion_nats(trained, block, T_MIN)
        + exact_reconstruction_nats(trained, block, T_MIN)
        for block in blocks_nL
    ]
    last = trained.schedule.sigma(torch.ones((), dtype=torch.float64))
    exact = np.mean(exact_n) / LENGTH + float(trained.graph.prior_kl_per_token(last))
    assert abs(bound.nats_per_token - exact) < 3 * bound.stderr
    # log_score gives the normalised scores, whose reverse process has a likelihood.
    likelihood_n = exact_log_likelihoods(trained, T_MIN, LENGTH)
    assert torch.logsumexp(likelihood_n, 0).item() == pytest.approx(0.0, abs=1e-5)
    assert bound.nats_per_token > -float(likelihood_n.mean()) / LENGTH - 3 * bound.stderr


@torch.no_grad()
def test_a_chain_has_the_bound_of_its_own_steps() -> None:
    """All paths of four steps, visited: the exact likelihood, and the exact bound above it."""
    steps = 4
    model = tiny_model("absorb", "loglinear", objective="d3pm_absorb", d3pm_steps=steps)
    objective, graph = model.objective, model.graph
    assert isinstance(objective, D3PMAbsorb)
    states_SL, clean_CL = all_states(graph.num_states, LENGTH), all_states(3, LENGTH)
    masked_SL = states_SL == graph.mask_id
    times = [number / steps for number in range(1, steps + 1)]
    lifted = [float(objective.lifted(model.schedule, torch.tensor([t]).double())) for t in times]
    keep = math.exp(-float(model.schedule.sigma(torch.ones((), dtype=torch.float64))))
    prior_V = torch.tensor([keep / 3] * 3 + [1 - keep], dtype=torch.float64)
    law_S = prior_V[states_SL].prod(1)
    for t, lift in reversed(list(zip(times, lifted))):
        token_SLN = softmax_table(model, states_SL, t).exp()
        step_SLV = torch.zeros(*states_SL.shape, graph.num_states, dtype=torch.float64)
        step_SLV[..., :3] = lift * token_SLN
        step_SLV[..., 3] = 1.0 - lift
        stay_SLV = torch.nn.functional.one_hot(states_SL, graph.num_states).double()
        step_SLV = torch.where(masked_SL[..., None], step_SLV, stay_SLV)
        parts = [step_SLV[:, place, states_SL[:, place]] for place in range(LENGTH)]
        law_S = law_S @ torch.stack(parts).prod(0)
    index = (states_SL[:, None] == clean_CL[None]).all(-1).long().argmax(0)
    likelihood_n = law_S[index].log()
    assert float(likelihood_n.exp().sum()) == pytest.approx(1.0, abs=1e-9)

    exact_n = []
    for clean_L in clean_CL:
        nats = LENGTH * float(graph.prior_kl_per_token(torch.tensor(-math.log(keep))))
        for t, lift in zip(times, lifted):
            sigma_L = model.schedule.sigma(torch.full((LENGTH,), t, dtype=torch.float64))
            law_LV = graph.transition_probabilities(clean_L, sigma_L)
            chance_S = law_LV[torch.arange(LENGTH), states_SL].prod(1)
            table_SLN = softmax_table(model, states_SL, t)
            loss_SL = -table_SLN[:, torch.arange(LENGTH), clean_L] * masked_SL
            nats += lift * float(chance_S @ loss_SL.sum(1))
        exact_n.append(nats)
    assert (np.array(exact_n) >= -likelihood_n.numpy() - 1e-6).all()
    bound = evaluate_bound(model, clean_CL, draws=64, batch_size=128, seed=1)
    assert abs(bound.nats_per_token - np.mean(exact_n) / LENGTH) < 3 * bound.stderr
    assert sum(value or 0.0 for value in bound.terms.values()) == pytest.approx(
        bound.nats_per_token
    )
    with pytest.raises(ConfigError, match="leave t_min out"):
        evaluate_bound(model, clean_CL, t_min=0.1)


@torch.no_grad()
def test_an_autoregressive_likelihood_is_exact() -> None:
    model = tiny_model("absorb", "loglinear", objective="autoregressive", num_tokens=3)
    blocks_nL = all_states(3, LENGTH)
    result = evaluate_bound(model, blocks_nL, batch_size=10)
    assert (result.kind, result.stderr, result.draws) == ("exact", 0.0, 0)
    assert np.exp(-LENGTH * result.block_nats_n).sum() == pytest.approx(1.0, abs=1e-6)
    # The chain rule with nothing but prefixes: what comes after cannot have been seen.
    for number in (0, 5, 26):
        nats, given = 0.0, [3]
        for token in blocks_nL[number].tolist():
            logits = model.logits(
                torch.tensor([given]), torch.zeros(1), torch.tensor([len(given) - 1])
            )
            nats -= float(logits[0, :3].double().log_softmax(0)[token])
            given.append(token)
        assert LENGTH * result.block_nats_n[number] == pytest.approx(nats, rel=NETWORK)
    padded = evaluate_bound(model, blocks_nL[:6], text_n=np.array([1, 2, 3, 3, 2, 1]))
    assert padded.tokens == 12
    whole = evaluate_bound(model, blocks_nL[2:4])
    np.testing.assert_allclose(padded.block_nats_n[2:4], whole.block_nats_n, rtol=NETWORK)
    # Given its first token, a block has what the whole has beyond that token alone.
    given = evaluate_bound(model, blocks_nL, context_n=np.ones(len(blocks_nL), dtype=np.int64))
    alone = evaluate_bound(model, blocks_nL, text_n=np.ones(len(blocks_nL), dtype=np.int64))
    np.testing.assert_allclose(
        (LENGTH - 1) * given.block_nats_n + alone.block_nats_n,
        LENGTH * result.block_nats_n,
        rtol=NETWORK,
    )
    for options in ({"draws": 4}, {"protocol": "paper"}, {"protocol": "any-order"}):
        with pytest.raises(ConfigError, match="is exact"):
            evaluate_bound(model, blocks_nL, **options)


@torch.no_grad()
def test_outputs_for_the_next_token_have_the_likelihood_given_the_first() -> None:
    model = tiny_model("absorb", "loglinear", objective="autoregressive", shift=True)
    blocks_nL = all_states(3, LENGTH)
    result = evaluate_bound(model, blocks_nL, batch_size=10)
    assert result.tokens == 27 * (LENGTH - 1) and list(result.notes.values()) == [27]
    chance_n = np.exp(-(LENGTH - 1) * result.block_nats_n)
    np.testing.assert_allclose(chance_n.reshape(3, 9).sum(1), 1.0, atol=1e-6)
    nats = 0.0
    for place in range(1, LENGTH):
        shown = blocks_nL[5:6, :place]
        logits = model.logits(shown, torch.zeros(1), torch.tensor([place - 1]))
        nats -= float(logits[0, :3].double().log_softmax(0)[blocks_nL[5, place]])
    assert (LENGTH - 1) * result.block_nats_n[5] == pytest.approx(nats, rel=NETWORK)
    # A first token that is context, or padding behind it, was never counted.
    given = evaluate_bound(model, blocks_nL, context_n=np.ones(27, dtype=np.int64))
    np.testing.assert_allclose(given.block_nats_n, result.block_nats_n, rtol=NETWORK)
    assert given.tokens == result.tokens and not given.notes
    mixed = evaluate_bound(model, blocks_nL[:2], text_n=np.array([1, 3]))
    assert (mixed.tokens, mixed.block_nats_n[0]) == (2, 0.0)
    with pytest.raises(DataError, match="nothing is predicted"):
        evaluate_bound(model, blocks_nL, text_n=np.ones(27, dtype=np.int64))


@torch.no_grad()
@pytest.mark.parametrize("objective", ["score_entropy", "masked_cross_entropy"])
def test_any_order_likelihood_is_the_mean_over_orders(objective: str) -> None:
    model = tiny_model(
        "absorb", "loglinear", objective=objective, time_conditioning=False, num_tokens=3
    )
    blocks_nL = all_states(3, LENGTH)
    states_SL = all_states(4, LENGTH)
    table_SLN = softmax_table(model, states_SL, 0.5)
    row = {tuple(state.tolist()): number for number, state in enumerate(states_SL)}
    orders = list(itertools.permutations(range(LENGTH)))
    path_nats = np.zeros((len(blocks_nL), len(orders)))
    for (number, clean_L), (which, order) in itertools.product(
        enumerate(blocks_nL), enumerate(orders)
    ):
        state = [3] * LENGTH
        for place in order:
            path_nats[number, which] -= table_SLN[row[tuple(state)], place, clean_L[place]]
            state[place] = int(clean_L[place])
    exact_n = -np.log(np.exp(-path_nats).mean(axis=1))
    assert np.exp(-exact_n).sum() == pytest.approx(1.0, abs=1e-6)

    result = evaluate_bound(model, blocks_nL, protocol="any-order", draws=96, batch_size=512)
    assert abs(result.nats_per_token - path_nats.mean() / LENGTH) < 3 * result.stderr
    assert result.likelihood is not None
    error = max(result.likelihood.stderr, 1e-6)
    assert abs(result.likelihood.nats_per_token - exact_n.mean() / LENGTH) < 3 * error
    assert result.likelihood.nats_per_token < result.nats_per_token
    some = evaluate_bound(
        model, blocks_nL[4:6], protocol="any-order", draws=96, batch_size=7, block_ids_n=[4, 5]
    )
    np.testing.assert_allclose(some.block_nats_n, result.block_nats_n[4:6], rtol=NETWORK)
    # Of the last token, given the others, there is one order.
    last = evaluate_bound(
        model,
        blocks_nL[4:6],
        protocol="any-order",
        draws=2,
        context_n=np.array([LENGTH - 1, LENGTH - 1]),
    )
    shown = [(*blocks_nL[number, :-1].tolist(), 3) for number in (4, 5)]
    exact_last = [
        -float(table_SLN[row[state], LENGTH - 1, blocks_nL[number, -1]])
        for number, state in zip((4, 5), shown, strict=True)
    ]
    np.testing.assert_allclose(last.block_nats_n, exact_last, rtol=NETWORK)
    conditioned = tiny_model("absorb", "loglinear")
    with pytest.raises(ConfigError, match="without time conditioning"):
        evaluate_bound(conditioned, blocks_nL, protocol="any-order")
