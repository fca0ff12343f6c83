"""The forward law against matrix exponentials of rate matrices written out here."""

import math

import pytest
import torch

from sedd_scale.config.graph_facts import GRAPHS
from sedd_scale.diffusion.graphs import Absorb, Uniform, make_graph
from sedd_scale.diffusion.row_law import row_law
from sedd_scale.errors import ConfigError, DataError
from tests.diffusion.reference import incoming_rates

SIGMAS = [1e-4, 0.03, 0.7, 3.0, 20.0]


def rate_matrix(name, num_tokens):
    """Generator with rows `from` and columns `to`."""
    if name == "uniform":
        full = torch.full((num_tokens, num_tokens), 1 / num_tokens, dtype=torch.float64)
        return full - torch.eye(num_tokens)
    matrix = -torch.eye(num_tokens + 1, dtype=torch.float64)
    matrix[:, num_tokens] += 1
    return matrix


@pytest.mark.parametrize("name", ["absorb", "uniform"])
@pytest.mark.parametrize("num_tokens", [2, 5, 50])
def test_forward_law_is_the_matrix_exponential(name, num_tokens):
    graph = make_graph(name, num_tokens)
    generator = rate_matrix(name, num_tokens)
    states = torch.arange(graph.num_states).expand(len(SIGMAS), -1)
    law = graph.transition_probabilities(states, torch.tensor(SIGMAS, dtype=torch.float64))
    for row, sigma in zip(law, SIGMAS, strict=True):
        torch.testing.assert_close(row, torch.matrix_exp(sigma * generator), rtol=1e-9, atol=1e-13)
    incoming = incoming_rates(graph, torch.arange(graph.num_states))
    off_diagonal = generator * (1 - torch.eye(graph.num_states))
    torch.testing.assert_close(incoming, off_diagonal.T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["absorb", "uniform"])
def test_corruption_is_the_law_pushed_through_its_uniforms(name):
    """On a fine grid of uniforms the frequencies are the law, up to the grid's spacing."""
    num_tokens, clean, side = 5, 3, 400
    graph = make_graph(name, num_tokens)
    grid = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    moves, tokens = torch.meshgrid(grid, grid, indexing="ij")
    for sigma in (0.03, 0.7, 3.0):
        sigma_B = torch.full((side,), sigma, dtype=torch.float64)
        noisy = graph.corrupt(torch.full((side, side), clean), sigma_B, moves, tokens)
        frequency = torch.bincount(noisy.flatten(), minlength=graph.num_states) / side**2
        law = graph.transition_probabilities(
            torch.tensor([clean]), torch.tensor([sigma], dtype=torch.float64)
        )
        torch.testing.assert_close(frequency.double(), law[0], rtol=0, atol=2 / side)


def test_corruption_takes_the_extreme_uniforms():
    almost_one = torch.full((1, 4), 1 - 2.0**-53, dtype=torch.float64)
    zero = torch.zeros(1, 4, dtype=torch.float64)
    clean = torch.tensor([[0, 1, 2, 4]])
    sigma = torch.tensor([20.0], dtype=torch.float64)
    for num_tokens in (5, 50257, 128256):
        assert (Uniform(num_tokens).corrupt(clean, sigma, zero, almost_one) == num_tokens - 1).all()
    assert torch.equal(Uniform(5).corrupt(clean, sigma, almost_one, zero), clean)
    assert (Absorb(5).corrupt(clean, sigma, zero) == 5).all()
    assert torch.equal(Absorb(5).corrupt(clean, sigma, almost_one), clean)


@pytest.mark.parametrize("num_tokens", [2, 5, 50, 32000])
def test_terminal_cost_by_summation(num_tokens):
    sigma = torch.tensor([0.01, 0.5, 2.0, 7.0], dtype=torch.float64)
    clean = torch.zeros(len(sigma), dtype=torch.int64)
    law = Uniform(num_tokens).transition_probabilities(clean, sigma)
    by_sum = (law * torch.log(law * num_tokens)).sum(-1)
    kl = Uniform(num_tokens).prior_kl_per_token(sigma)
    torch.testing.assert_close(kl, by_sum, rtol=1e-7, atol=1e-11)

    law = Absorb(num_tokens).transition_probabilities(clean, sigma)
    keep = torch.exp(-sigma)
    prior = (keep / num_tokens)[:, None].repeat(1, num_tokens + 1)
    prior[:, num_tokens] = 1 - keep
    by_sum = torch.special.xlogy(law, law / prior).sum(-1)
    torch.testing.assert_close(Absorb(num_tokens).prior_kl_per_token(sigma), by_sum)


def test_terminal_cost_at_much_noise_is_small_and_positive():
    sigma = torch.tensor([10.0, 15.0, 20.0], dtype=torch.float64)
    for num_tokens in (2, 50257):
        kl = Uniform(num_tokens).prior_kl_per_token(sigma)
        # Half the chi-square distance, to leading order in e^-sigma.
        leading = (num_tokens - 1) * torch.exp(-2 * sigma) / 2
        assert (kl > 0).all()
        assert kl[2].item() == pytest.approx(leading[2].item(), rel=1e-3)


def test_names_sizes_and_refusals():
    absorb, uniform = make_graph("absorb", 50), make_graph("uniform", 50)
    assert (absorb.num_tokens, absorb.num_states, absorb.mask_id) == (50, 51, 50)
    assert (uniform.num_tokens, uniform.num_states, uniform.mask_id) == (50, 50, None)
    with pytest.raises(ConfigError, match="roulette"):
        make_graph("roulette", 50)
    with pytest.raises(ConfigError, match="vocab_size=1"):
        make_graph("absorb", 1)
    absorb.check_tokens(torch.tensor([0, 49]))
    absorb.check_tokens(torch.empty(0, dtype=torch.int64))
    for bad in (50, -1):
        with pytest.raises(DataError, match=f"token id {bad} "):
            absorb.check_tokens(torch.tensor([0, bad]))
    assert math.isclose(
        absorb.prior_kl_per_token(torch.tensor(0.0)).item(), math.log(50), rel_tol=1e-6
    )


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_known_by_name_is_so(name: str) -> None:
    """The table that plans and checks read, against the graph and the laws of its rows."""
    facts, graph = GRAPHS[name], make_graph(name, 7)
    assert facts.has_mask == (graph.mask_id is not None) == (graph.num_states == 8)
    assert row_law(graph, mean=True).graph is graph
    if facts.scales_by_sigma:
        assert row_law(graph, scaled=True).graph is graph
    else:
        with pytest.raises(ConfigError, match="does not go with"):
            row_law(graph, scaled=True)
    # Maximum, sum of exponentials and the clean token's logit; and the sum where it is counted.
    assert facts.row_statistics == 3 + (not row_law(graph).counts_own)
