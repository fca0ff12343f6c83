"""Reverse steps against exact posteriors of enumerated chains, and draws against their tables."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.reverse import analytic_log_factor, draw_categorical, euler_log_factor
from sedd_scale.diffusion.row_law import row_law
from sedd_scale.diffusion.schedules import make_schedule
from tests.diffusion.reference import (
    absorb_step_rows,
    analytic_probabilities,
    as_distribution,
    denoise_probabilities,
    euler_probabilities,
    log_scores_from_logits,
)
from tests.repository import GOLDEN
from tests.tolerance import ROUNDING

START = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
GRAPHS = ["absorb", "uniform"]
STEPS = [(20.0, 3.0), (3.0, 1.0), (1.0, 0.2), (0.2, 1e-4), (1e-3, 1e-4)]


def law_at(graph, sigma):
    rows = graph.transition_probabilities(
        torch.arange(4), torch.full((4,), sigma, dtype=torch.float64)
    )
    return START @ rows


def true_log_scores(graph, sigma):
    """[x, y]: ln p(y) / p(x) of the noisy law of one token."""
    law = law_at(graph, sigma)
    return torch.log(law[None, :] / law[:, None])


def posterior(graph, sigma_t, sigma_s):
    """[x, y]: p(x_s = y | x_t = x), by Bayes."""
    states = torch.arange(graph.num_states)
    step = graph.transition_probabilities(
        states, torch.full(states.shape, sigma_t - sigma_s, dtype=torch.float64)
    )
    return (law_at(graph, sigma_s)[:, None] * step / law_at(graph, sigma_t)[None, :]).T


def noise(graph, sigma):
    return torch.full((graph.num_states,), sigma, dtype=torch.float64)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(("sigma_t", "sigma_s"), STEPS)
def test_analytic_step_with_true_scores_is_the_posterior(name, sigma_t, sigma_s):
    graph = make_graph(name, 4)
    states = torch.arange(graph.num_states)
    table = analytic_probabilities(
        true_log_scores(graph, sigma_t), states, noise(graph, sigma_t), noise(graph, sigma_s), graph
    )
    torch.testing.assert_close(table, posterior(graph, sigma_t, sigma_s), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("sigma", [3.0, 0.5, 0.01])
def test_last_step_with_true_scores_is_the_posterior_of_the_clean_token(name, sigma):
    graph = make_graph(name, 4)
    states = torch.arange(graph.num_states)
    table = denoise_probabilities(true_log_scores(graph, sigma), states, noise(graph, sigma), graph)
    forward = graph.transition_probabilities(
        torch.arange(4), torch.full((4,), sigma, dtype=torch.float64)
    )
    bayes = (START[:, None] * forward / (START @ forward)).T
    torch.testing.assert_close(table[:, :4], bayes, rtol=1e-8, atol=1e-10)
    assert (table[:, 4:] == 0).all()


@pytest.mark.parametrize("name", GRAPHS)
def test_euler_step_is_the_posterior_to_first_order(name):
    graph, schedule = make_graph(name, 4), make_schedule("loglinear")
    states = torch.arange(graph.num_states)
    errors = []
    for step_size in (0.02, 0.01, 0.005):
        t, s = (torch.tensor([v], dtype=torch.float64) for v in (0.6, 0.6 - step_size))
        sigma_t, sigma_s = schedule.sigma(t).item(), schedule.sigma(s).item()
        rate = schedule.rate(t).expand(graph.num_states)
        table = euler_probabilities(true_log_scores(graph, sigma_t), states, step_size, rate, graph)
        torch.testing.assert_close(table.sum(-1), torch.ones(graph.num_states).double())
        errors.append((table - posterior(graph, sigma_t, sigma_s)).abs().max().item())
    if name == "absorb":
        # loglinear unmasks at a constant pace, so the first order is all there is.
        assert max(errors) < 1e-12
    else:
        assert errors[0] > 1e-6 and errors[1] < 0.3 * errors[0] and errors[2] < 0.3 * errors[1]


@pytest.mark.parametrize("name", GRAPHS)
def test_rows_of_any_score_sum_to_one_and_no_time_is_no_change(name):
    graph = make_graph(name, 6)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(graph.num_states, (3, 11), generator=generator)
    log_score = torch.randn(3, 11, graph.num_states, generator=generator).double()
    log_score = log_score.scatter(-1, states[..., None], 0.0)
    sigma_t = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(states, graph.num_states).double()
    ones = torch.ones(3, 11, dtype=torch.float64)
    tables = [
        analytic_probabilities(log_score, states, sigma_t, sigma_t * 0.4, graph),
        euler_probabilities(log_score, states, 0.01, sigma_t, graph),
        denoise_probabilities(log_score, states, sigma_t, graph),
    ]
    for table in tables:
        assert table.shape == (3, 11, graph.num_states) and table.dtype == torch.float64
        torch.testing.assert_close(table.sum(-1), ones, rtol=1e-10, atol=1e-10)
        clamped = as_distribution(table)
        assert (clamped >= 0).all()
        torch.testing.assert_close(clamped.sum(-1), ones)
        if graph.mask_id is not None:
            visible = states != graph.mask_id
            assert torch.equal(table[visible], one_hot[visible])
    still = analytic_probabilities(log_score, states, sigma_t, sigma_t, graph)
    torch.testing.assert_close(still, one_hot, rtol=0, atol=1e-12)
    still = euler_probabilities(log_score, states, 0.0, sigma_t, graph)
    assert torch.equal(still, one_hot)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 4.0])  # the last leaves no room for the mask
def test_masked_rows_alone_give_the_table(scaled, shift):
    graph, schedule = make_graph("absorb", 6), make_schedule("loglinear")
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).double() + shift
    states = torch.full((5,), graph.mask_id)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9, 1.0], dtype=torch.float64)
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(t - 0.05)
    log_score = log_scores_from_logits(logits, states, sigma_t, graph=graph, scaled=scaled)
    law = row_law(graph, scaled=scaled)
    pairs = [
        (
            analytic_probabilities(log_score, states, sigma_t, sigma_s, graph),
            analytic_log_factor(sigma_t, sigma_s, law=law),
        ),
        (
            euler_probabilities(log_score, states, 0.05, schedule.rate(t), graph),
            euler_log_factor(0.05, sigma=sigma_t, rate=schedule.rate(t), law=law),
        ),
    ]
    for table, log_factor in pairs:
        leave, stay = absorb_step_rows(logits[:, :6], log_factor)
        torch.testing.assert_close(
            torch.cat([leave, stay[:, None]], 1), as_distribution(table), rtol=1e-9, atol=1e-12
        )


def test_loglinear_analytic_step_unmasks_its_share_of_time():
    """Normalised scores: a masked position is unmasked with probability (t - s) / t."""
    schedule = make_schedule("loglinear")
    t = torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)
    s = t * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    law = row_law(make_graph("absorb", 6), scaled=True)
    factor = analytic_log_factor(schedule.sigma(t), schedule.sigma(s), law=law)
    logits = torch.log_softmax(torch.randn(3, 6).double(), -1) + math.log(6)
    leave, stay = absorb_step_rows(logits, factor)
    torch.testing.assert_close(leave.sum(-1), (t - s) / t, rtol=1e-10, atol=0)
    torch.testing.assert_close(stay, s / t, rtol=1e-10, atol=0)


def test_draws_invert_the_cumulative_law():
    table = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert draw_categorical(table.expand(6, 6), uniform).tolist() == [1, 1, 3, 3, 4, 4]
    # Rows in any scale, and a state of probability 0 even where the sums round.
    third = torch.tensor([[0.1, 0.2, 0.3, 0.0]], dtype=torch.float64)
    assert draw_categorical(third, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 2
    grid = (torch.arange(100000, dtype=torch.float64) + 0.5) / 100000
    rows = torch.rand(7, generator=torch.Generator().manual_seed(4)).double()
    drawn = draw_categorical(rows.expand(100000, 7), grid)
    frequency = torch.bincount(drawn, minlength=7) / 100000
    torch.testing.assert_close(frequency.double(), rows / rows.sum(), rtol=0, atol=2e-5)


def test_draws_keep_the_tail():
    """A tail of 1e-9, which single precision cannot address, is found by a uniform in it."""
    table = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert draw_categorical(table, torch.tensor([1 - 5e-10], dtype=torch.float64)).item() == 1


@pytest.mark.parametrize("case", ["absorb-loglinear", "uniform-geometric"])
def test_reference_numbers(case):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    graph_name, noise_name = case.split("-")
    graph, schedule = make_graph(graph_name, 50), make_schedule(noise_name)
    xt, log_score, step_size = golden["xt"], golden["log_score"], golden["step_size"].item()
    t = golden["t"].double()
    sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(t - step_size)
    close = {"rtol": 1e-4, "atol": 2e-6}
    euler = euler_probabilities(log_score, xt, step_size, schedule.rate(t), graph)
    torch.testing.assert_close(euler.float(), golden["euler_probs"], **close)
    analytic = analytic_probabilities(log_score, xt, sigma_t, sigma_s, graph)
    torch.testing.assert_close(analytic.float(), golden["analytic_probs"], **close)
    denoise = denoise_probabilities(log_score, xt, sigma_t, graph)[..., :50]
    reference = golden["denoise_probs"]
    if graph_name == "absorb":
        reference = reference / reference.sum(-1, keepdim=True)
    torch.testing.assert_close(denoise[:2].float(), reference[:2], **close)
    # The reference divides by an e^-sigma that single precision knows to 2^-24 only.
    kept = ROUNDING * sigma_t[2].exp().item()
    torch.testing.assert_close(denoise[2].float(), reference[2], rtol=kept, atol=2e-6)
