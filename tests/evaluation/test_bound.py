"""The bound against exact integration and exact likelihoods where every state can be visited."""

import math

import numpy as np
import pytest
import torch

from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.evaluation import PROTOCOLS
from sedd_scale.evaluation.bound import evaluate_bound
from tests.evaluation.enumeration import (
    all_states,
    exact_diffusion_nats,
    exact_log_likelihoods,
    exact_reconstruction_nats,
    tiny_model,
)
from tests.tolerance import NETWORK

T_MIN = 1e-2
LENGTH = 2
CASES = [
    (graph, noise)
    for graph in ("absorb", "uniform", "mean", "absorb mean")
    for noise in ("loglinear", "geometric", "cosine", "linear")
]


@pytest.mark.parametrize("graph, noise", CASES)
def test_estimate_is_the_exact_bound_and_above_the_likelihood(graph: str, noise: str) -> None:
    model = tiny_model(graph, noise)
    blocks_nL = all_states(model.graph.num_tokens, LENGTH)
    diffusion = np.array([exact_diffusion_nats(model, block, T_MIN) for block in blocks_nL])
    decode = np.array([exact_reconstruction_nats(model, block, T_MIN) for block in blocks_nL])
    last = model.schedule.sigma(torch.ones((), dtype=torch.float64))
    prior = LENGTH * float(model.graph.prior_kl_per_token(last))
    exact_n = diffusion + decode + prior

    # Of normalised scores the bound is so tight that the integration must be finer.
    steps = 1000 if graph == "absorb mean" else 150
    likelihood_n = exact_log_likelihoods(model, T_MIN, LENGTH, num_steps=steps)
    assert torch.logsumexp(likelihood_n, 0).item() == pytest.approx(0.0, abs=1e-5)
    assert (exact_n >= -likelihood_n.numpy() - 1e-4).all()

    result = evaluate_bound(model, blocks_nL, draws=64, t_min=T_MIN, batch_size=64, seed=3)
    assert 0 < result.stderr < 0.1 * result.nats_per_token
    assert abs(result.nats_per_token - exact_n.mean() / LENGTH) < 3 * result.stderr
    terms = result.terms
    assert terms["prior"] == pytest.approx(prior / LENGTH)
    assert terms["diffusion"] == pytest.approx(diffusion.mean() / LENGTH, rel=0.2)
    assert sum(value or 0.0 for value in terms.values()) == pytest.approx(result.nats_per_token)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_four_tokens_at_four_places(graph: str) -> None:
    """The largest that is enumerated: 625 and 256 states; a few of the 256 sequences."""
    model = tiny_model(graph, "loglinear", num_tokens=4, block_length=4)
    likelihood_n = exact_log_likelihoods(model, T_MIN, 4)
    assert torch.logsumexp(likelihood_n, 0).item() == pytest.approx(0.0, abs=1e-4)
    chosen = [0, 27, 201]
    blocks_nL = all_states(4, 4)[chosen]
    last = model.schedule.sigma(torch.ones((), dtype=torch.float64))
    exact_n = np.array(
        [
            exact_diffusion_nats(model, block, T_MIN, nodes=40)
            + exact_reconstruction_nats(model, block, T_MIN)
            + 4 * float(model.graph.prior_kl_per_token(last))
            for block in blocks_nL
        ]
    )
    assert (exact_n >= -likelihood_n[chosen].numpy() - 1e-4).all()
    result = evaluate_bound(model, blocks_nL, draws=256, t_min=T_MIN, batch_size=256, seed=1)
    assert abs(result.nats_per_token - exact_n.mean() / 4) < 3 * result.stderr


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_outputs_for_the_next_position_have_a_bound(graph: str) -> None:
    model = tiny_model(graph, "loglinear", shift=True)
    blocks_nL = all_states(3, LENGTH)
    last = model.schedule.sigma(torch.ones((), dtype=torch.float64))
    exact_n = np.array(
        [
            exact_diffusion_nats(model, block, T_MIN)
            + exact_reconstruction_nats(model, block, T_MIN)
            + LENGTH * float(model.graph.prior_kl_per_token(last))
            for block in blocks_nL
        ]
    )
    assert (exact_n >= -exact_log_likelihoods(model, T_MIN, LENGTH).numpy() - 1e-4).all()
    result = evaluate_bound(model, blocks_nL, draws=64, t_min=T_MIN, batch_size=64, seed=3)
    assert abs(result.nats_per_token - exact_n.mean() / LENGTH) < 3 * result.stderr


def test_reconstruction_is_the_exact_one_with_many_draws() -> None:
    for graph in ("absorb", "uniform"):
        model = tiny_model(graph, "loglinear")
        blocks_nL = torch.tensor([[0, 2]])
        exact = exact_reconstruction_nats(model, blocks_nL[0], 0.3) / LENGTH
        found = []
        for seed in range(4):
            result = evaluate_bound(
                model, blocks_nL, draws=512, replicates=512, t_min=0.3, batch_size=512, seed=seed
            )
            found.append(result.terms["reconstruction"] or 0.0)
        assert np.mean(found) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(
    "graph, protocol",
    [("absorb", "low-variance"), ("uniform", "low-variance"), ("absorb", "paper")],
)
def test_intervals_cover_the_exact_value(graph: str, protocol: str) -> None:
    """Errors of half or one and a half times their size would give 67% or 99.7%."""
    model = tiny_model(graph, "loglinear")
    blocks_nL = torch.tensor([[0, 1], [2, 2], [1, 0]])
    diffusion = np.mean([exact_diffusion_nats(model, block, T_MIN) for block in blocks_nL])
    if protocol == "paper":
        exact, options = diffusion / (1 - T_MIN) / LENGTH, {"draws": 48}
    else:
        decode = [exact_reconstruction_nats(model, block, T_MIN) for block in blocks_nL]
        last = model.schedule.sigma(torch.ones((), dtype=torch.float64))
        exact = float(model.graph.prior_kl_per_token(last))
        exact += (diffusion + np.mean(decode)) / LENGTH
        options = {"draws": 32, "replicates": 8}
    options |= {"protocol": protocol, "t_min": T_MIN, "batch_size": 144}
    results = [evaluate_bound(model, blocks_nL, seed=seed, **options) for seed in range(150)]
    covered = np.mean([found.ci95[0] <= exact <= found.ci95[1] for found in results])
    assert 0.90 <= covered <= 0.99
    # Without bias, and the error is what the estimates of one seed really scatter by.
    found_n = np.array([found.nats_per_token for found in results])
    error = math.sqrt(np.mean([found.stderr**2 for found in results]))
    assert abs(found_n.mean() - exact) < 3.5 * error / math.sqrt(len(results))
    assert found_n.std(ddof=1) == pytest.approx(error, rel=0.25)


def test_paper_protocol_is_the_mean_over_independent_times() -> None:
    model = tiny_model("absorb", "loglinear")
    blocks_nL = torch.tensor([[0, 1], [2, 2]])
    exact = np.mean([exact_diffusion_nats(model, block, T_MIN) for block in blocks_nL])
    result = evaluate_bound(
        model, blocks_nL, protocol="paper", draws=600, t_min=T_MIN, batch_size=200
    )
    assert result.replicates == 600
    assert result.terms["prior"] is None and result.terms["reconstruction"] is None
    expected = exact / (1 - T_MIN) / LENGTH
    assert abs(result.nats_per_token - expected) < 3 * result.stderr


@pytest.mark.parametrize("graph, noise", CASES)
def test_stratification_lowers_the_error(graph: str, noise: str) -> None:
    model = tiny_model(graph, noise)
    blocks_nL = all_states(3, LENGTH)
    low = evaluate_bound(model, blocks_nL, draws=256, replicates=8, batch_size=64)
    paper = evaluate_bound(model, blocks_nL, draws=256, protocol="paper", batch_size=64)
    assert low.stderr < 0.7 * paper.stderr


def test_a_block_has_the_same_nats_in_any_company() -> None:
    model = tiny_model("uniform", "loglinear")
    blocks_nL = all_states(3, LENGTH)
    whole = evaluate_bound(model, blocks_nL, draws=8, replicates=4, batch_size=24)
    ids = [7, 2, 5]
    some = evaluate_bound(
        model, blocks_nL[ids], draws=8, replicates=4, batch_size=5, block_ids_n=ids
    )
    np.testing.assert_allclose(some.block_nats_n, whole.block_nats_n[ids], rtol=NETWORK)
    other = evaluate_bound(model, blocks_nL, draws=8, replicates=4, batch_size=24, seed=1)
    assert (np.abs(other.block_nats_n / whole.block_nats_n - 1) > 1e-3).all()


def test_what_cannot_be_evaluated_is_refused() -> None:
    model = tiny_model("absorb", "loglinear")
    blocks_nL = all_states(3, LENGTH)
    with pytest.raises(ConfigError, match="give at least 2"):
        evaluate_bound(model, blocks_nL, draws=1)
    with pytest.raises(ConfigError, match="does not split 6 draws"):
        evaluate_bound(model, blocks_nL, draws=6, replicates=4)
    with pytest.raises(ConfigError, match="protocol 'best' is unknown"):
        evaluate_bound(model, blocks_nL, protocol="best")
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate_bound(model, blocks_nL[:0])
    for protocol in PROTOCOLS:
        with pytest.raises(ConfigError, match="batch size 0"):
            evaluate_bound(model, blocks_nL, batch_size=0, protocol=protocol)
    with pytest.raises(DataError, match=r"of type torch\.float32"):
        evaluate_bound(model, blocks_nL.float())
    with pytest.raises(DataError, match="token id 3 is outside"):
        evaluate_bound(model, torch.full((1, 2), 3))
    with torch.no_grad():
        model.network.head.linear.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate_bound(model, blocks_nL)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
@pytest.mark.parametrize("place", [0, 1])
def test_padding_and_context_have_no_part_in_the_bound(graph: str, place: int) -> None:
    """Exactly: noise on one token alone, beside one of padding behind it or of context before it;
    and the mean over the text of all blocks."""
    model = tiny_model(graph, "loglinear")
    blocks = torch.tensor([[0, 2], [1, 0]])
    counted = torch.arange(2)[None] == place
    nodes, weights = np.polynomial.legendre.leggauss(80)
    times = torch.from_numpy(T_MIN + (1 - T_MIN) * (nodes + 1) / 2)
    states = torch.arange(model.graph.num_states)
    noisy = blocks[0].repeat(len(states), 1)
    noisy[:, place] = states

    def mean_nats(t: torch.Tensor) -> float:
        sigma = model.schedule.sigma(t[None])
        law = model.graph.transition_probabilities(blocks[0, place : place + 1], sigma)[0]
        clean = blocks[:1].expand(len(states), -1)
        nats = model.loss(clean, t_B=t.expand(len(states)), xt_BL=noisy, counted_BL=counted)
        return float((law * nats.detach().double()).sum())

    exact = (1 - T_MIN) / 2 * sum(w * mean_nats(t) for w, t in zip(weights, times))
    part = {"text_n": np.array([place + 1]), "context_n": np.array([place]), "t_min": T_MIN}
    one = evaluate_bound(model, blocks[:1], draws=2000, batch_size=2000, **part)
    assert one.tokens == 1
    assert one.terms["diffusion"] == pytest.approx(exact, abs=4 * one.stderr)
    # Together with a whole block of two tokens, the mean is over three.
    other = evaluate_bound(model, blocks[1:], draws=16, t_min=T_MIN, block_ids_n=[1], replicates=2)
    first = evaluate_bound(model, blocks[:1], draws=16, replicates=2, **part)
    part |= {"text_n": np.array([place + 1, 2]), "context_n": np.array([place, 0])}
    both = evaluate_bound(model, blocks, draws=16, replicates=2, **part)
    assert both.tokens == 3
    assert both.nats_per_token == pytest.approx(
        (first.nats_per_token + 2 * other.nats_per_token) / 3, rel=NETWORK
    )
    assert both.block_nats_n == pytest.approx(
        [first.nats_per_token, other.nats_per_token], rel=NETWORK
    )
    with pytest.raises(DataError, match="no token to predict"):
        evaluate_bound(model, blocks[:1], context_n=np.array([2]))
