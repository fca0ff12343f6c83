"""Score entropy from statistics against its definition, its derivatives and its integral."""

import math

import pytest
import torch
from safetensors.torch import load_file

from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.schedules import make_schedule
from sedd_scale.diffusion.score_entropy import RowNoise, Statistics, log_expm1
from sedd_scale.errors import ConfigError
from tests.diffusion.reference import (
    log_score_score_entropy,
    log_scores_from_logits,
    row_loss,
    row_statistics,
)
from tests.repository import GOLDEN

SIGMAS = torch.tensor([1e-4, 1e-3, 0.03, 0.4, 1.0, 3.0, 9.0, 20.0], dtype=torch.float64)
KINDS = [("absorb", True), ("absorb", False), ("uniform", False)]
# Sizes at which 1 - N / (e1 + N) is exactly 0 in single precision at small sigma are among them.
SIZES = [2, 5, 50, 8192, 32000, 32768, 50304, 65536, 128256]


def noise_at(sigma):
    """Rates of the geometric schedule at those noise levels."""
    rate = sigma * math.log(20 / 1e-4)
    return RowNoise(sigma, rate, rate / torch.expm1(sigma))


def rows_of(graph, sigma, *, seed=0, spread=1.5):
    """Rows of logits over N, noisy and clean tokens; half of uniform's rows are unchanged."""
    generator = torch.Generator().manual_seed(seed)
    count = len(sigma)
    logits_MN = torch.randn(count, graph.num_tokens, generator=generator).double() * spread
    clean_M = torch.randint(graph.num_tokens, (count,), generator=generator)
    if graph.mask_id is not None:
        return logits_MN, torch.full_like(clean_M, graph.mask_id), clean_M
    shift_M = torch.randint(1, graph.num_tokens, (count,), generator=generator)
    shift_M[::2] = 0
    return logits_MN, (clean_M + shift_M) % graph.num_tokens, clean_M


def by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise):
    uniform = graph.mask_id is None
    statistics = row_statistics(logits_MN, clean_M, noisy_M if uniform else None)
    unchanged_M = noisy_M == clean_M if uniform else None
    rows = row_loss(statistics, noise, graph=graph, scaled=scaled, unchanged_M=unchanged_M)
    return statistics, rows


def gradient_of(graph, statistics, rows, logits_MN, noisy_M, clean_M):
    grad_MN = rows.grad_exp[:, None] * torch.exp(logits_MN - statistics.max[:, None])
    grad_MN = grad_MN + rows.grad_rest[:, None]
    grad_MN = grad_MN.scatter_add(1, clean_M[:, None], rows.grad_target[:, None])
    if graph.mask_id is None:
        grad_MN = grad_MN.scatter(1, noisy_M[:, None], 0.0)
    return grad_MN


def by_definition(graph, scaled, logits_MN, noisy_M, clean_M, noise):
    padding = logits_MN.new_zeros(len(logits_MN), graph.num_states - graph.num_tokens)
    log_score_MV = log_scores_from_logits(
        torch.cat([logits_MN, padding], 1), noisy_M, noise.sigma, graph=graph, scaled=scaled
    )
    return log_score_score_entropy(log_score_MV, noisy_M, clean_M, noise, graph=graph)


def terms_by_hand(graph, scaled, logits_M, noisy, clean, sigma):
    """One row from scratch with Python floats: sum of Q (s - r ln s + K(r)), before the rate."""
    size, e1 = graph.num_tokens, math.expm1(sigma)
    total = 0.0
    for y, z in enumerate(logits_M.tolist()):
        if graph.mask_id is not None:
            log_s = z - math.log(e1) - math.log(size) if scaled else z
            r, q = (1 / e1 if y == clean else 0.0), 1.0
        else:
            if y == noisy:
                continue
            log_s, q, a = z, 1 / size, e1 / (e1 + size)
            r = a if clean == noisy else (1 / a if y == clean else 1.0)
        total += q * (math.exp(log_s) - r * log_s + (r * (math.log(r) - 1) if r else 0.0))
    return total


@pytest.mark.parametrize(("name", "scaled"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_statistics_give_the_definition(name, scaled, size):
    graph = make_graph(name, size)
    noise = noise_at(SIGMAS)
    rows = rows_of(graph, SIGMAS)
    _, result = by_statistics(graph, scaled, *rows, noise)
    direct = by_definition(graph, scaled, *rows, noise)
    assert torch.isfinite(result.loss).all() and (result.loss >= 0).all()
    torch.testing.assert_close(result.loss, direct, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "scaled"), KINDS)
@pytest.mark.parametrize("size", [2, 5, 50])
def test_definition_term_by_term(name, scaled, size):
    graph = make_graph(name, size)
    noise = noise_at(SIGMAS)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=1)
    direct = by_definition(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    for i, sigma in enumerate(SIGMAS.tolist()):
        by_hand = noise.rate[i].item() * terms_by_hand(
            graph, scaled, logits_MN[i], noisy_M[i].item(), clean_M[i].item(), sigma
        )
        assert direct[i].item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(("name", "scaled"), KINDS)
@pytest.mark.parametrize("size", [2, 5, 50, 8192])
def test_gradient_is_that_of_the_definition(name, scaled, size):
    graph = make_graph(name, size)
    noise = noise_at(SIGMAS)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=2)
    statistics, result = by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    closed = gradient_of(graph, statistics, result, logits_MN, noisy_M, clean_M)
    logits_MN.requires_grad_()
    by_definition(graph, scaled, logits_MN, noisy_M, clean_M, noise).sum().backward()
    scale = logits_MN.grad.abs().amax(1, keepdim=True)
    torch.testing.assert_close(closed / scale, logits_MN.grad / scale, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_gradient_by_finite_differences(name, scaled):
    graph = make_graph(name, 5)
    noise = noise_at(SIGMAS)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=3)
    statistics, result = by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    closed = gradient_of(graph, statistics, result, logits_MN, noisy_M, clean_M)
    step = 1e-5
    for y in range(5):
        nudge = step * torch.nn.functional.one_hot(torch.tensor(y), 5).double()
        _, up = by_statistics(graph, scaled, logits_MN + nudge, noisy_M, clean_M, noise)
        _, down = by_statistics(graph, scaled, logits_MN - nudge, noisy_M, clean_M, noise)
        slope = (up.loss - down.loss) / (2 * step)
        scale = closed.abs().amax(1) + result.loss
        torch.testing.assert_close(slope / scale, closed[:, y] / scale, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "scaled"), KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_single_precision_statistics(name, scaled, size):
    """The statistics' rounding and nothing else: a few units in the last place.

    Sums are taken pairwise: of N terms log2(N) <= 17 roundings, and 3e-6 is 50.
    """
    graph = make_graph(name, size)
    noise = noise_at(SIGMAS)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=4)
    logits_MN = logits_MN.float().double()
    _, exact = by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    _, single = by_statistics(graph, scaled, logits_MN.float(), noisy_M, clean_M, noise)
    for got, want in zip(single, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_uniform_at_its_optimum_in_single_precision(size):
    """The true ratios as scores: every term vanishes, and single precision leaves only rounding."""
    graph = make_graph("uniform", size)
    noise = noise_at(SIGMAS)
    _, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=5)
    law = graph.transition_probabilities(clean_M, SIGMAS)
    logits_MN = torch.log(law / law.gather(1, noisy_M[:, None]))
    ratio = (law / law.gather(1, noisy_M[:, None])).sum(1) * noise.rate / size
    for dtype, unit in ((torch.float64, 2e-15), (torch.float32, 1e-6)):
        statistics, result = by_statistics(
            graph, False, logits_MN.to(dtype), noisy_M, clean_M, noise
        )
        size_of_terms = ratio * (1 + logits_MN.abs().amax(1))
        assert (result.loss.double().abs() <= unit * size_of_terms).all()
        grad = gradient_of(graph, statistics, result, logits_MN.to(dtype), noisy_M, clean_M)
        grad_scale = (noise.rate / size * (law / law.gather(1, noisy_M[:, None])).amax(1))[:, None]
        assert (grad.double().abs() <= 20 * unit * grad_scale).all()


def test_absorb_at_its_optimum():
    """Normalised logits: loss is cross-entropy; a shift u adds e^u - 1 - u, to the digit."""
    graph = make_graph("absorb", 50)
    noise = noise_at(SIGMAS)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=6)
    log_law_MN = torch.log_softmax(logits_MN, -1)
    cross_entropy = -log_law_MN.gather(1, clean_M[:, None]).squeeze(1)
    for u in (0.0, 1e-9, 1e-5, -1e-3, 0.02, 3.0):
        normalised = log_law_MN + math.log(50) + u
        _, result = by_statistics(graph, True, normalised, noisy_M, clean_M, noise)
        penalty = u**2 / 2 + u**3 / 6 + u**4 / 24 if abs(u) < 1e-2 else math.expm1(u) - u
        torch.testing.assert_close(
            result.loss / noise.rate_over_expm1, cross_entropy + penalty, rtol=1e-13, atol=0
        )
    # The penalty alone: a certain prediction, off by u.
    for u in (1e-7, 1e-5, 9.9e-3, 1.01e-2):
        certain = Statistics(
            *(torch.tensor([v]).double() for v in (u + math.log(50), 1.0)), None, None
        )
        certain = certain._replace(target=certain.max)
        one = RowNoise(*(torch.ones(1, dtype=torch.float64),) * 3)
        loss = row_loss(certain, one, graph=graph, scaled=True).loss.item()
        exact_u = certain.max.item() - math.log(50)
        assert loss == pytest.approx(exact_u**2 * (0.5 + exact_u / 6 + exact_u**2 / 24), rel=1e-7)


def test_zero_head_pays_the_logarithm_of_the_vocabulary():
    """Absorb, loglinear, zero logits: on average 0.999 ln N nats a token over t in [1e-3, 1]."""
    size = 50257
    schedule = make_schedule("loglinear")
    t = torch.linspace(1e-3, 1, 1001, dtype=torch.float64)
    noise = RowNoise(schedule.sigma(t), schedule.rate(t), schedule.rate_over_expm1(t))
    zero = torch.zeros_like(t)
    statistics = Statistics(zero, zero + size, zero, None)
    result = row_loss(statistics, noise, graph=make_graph("absorb", size), scaled=True)
    expected = (result.loss * schedule.move_probability(t)).mean().item()
    assert expected == pytest.approx(0.999 * math.log(size), rel=1e-12)


@pytest.mark.parametrize("name", ["absorb", "uniform"])
@pytest.mark.parametrize("noise_name", ["loglinear", "geometric", "cosine", "linear"])
def test_loss_integrates_to_the_divergence_it_bounds(name, noise_name):
    """True scores of a one-token law: the loss over [a, b] is the fall of KL(p_t|x0 || p_t)."""
    graph, schedule = make_graph(name, 4), make_schedule(noise_name)
    start_law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    edges = torch.linspace(0.02, 0.98, 401, dtype=torch.float64)
    tokens = torch.arange(4)

    def marginal(t):
        law_0 = graph.transition_probabilities(tokens.expand(len(t), -1), schedule.sigma(t))
        return law_0, (start_law[:, None] * law_0).sum(1)

    def divergence(t):
        law_0, law = marginal(torch.tensor([t], dtype=torch.float64))
        return torch.special.xlogy(law_0, law_0 / law[:, None]).sum(-1)[0]

    # Gauss-Legendre with two points in each of many panels.
    middle, half = (edges[1:] + edges[:-1]) / 2, edges.diff() / 2
    t = torch.cat([middle - half / math.sqrt(3), middle + half / math.sqrt(3)])
    law_0, law = marginal(t)
    noise = RowNoise(schedule.sigma(t), schedule.rate(t), schedule.rate_over_expm1(t))
    integral = torch.zeros(4, dtype=torch.float64)
    states = [4] if name == "absorb" else range(4)
    for x in states:
        log_score = torch.log(law / law[:, x : x + 1])
        for clean in range(4):
            noisy_M = torch.full((len(t),), x)
            clean_M = torch.full((len(t),), clean)
            _, result = by_statistics(graph, False, log_score[:, :4], noisy_M, clean_M, noise)
            integral[clean] += (law_0[:, clean, x] * result.loss * torch.cat([half, half])).sum()
    expected = divergence(0.02) - divergence(0.98)
    torch.testing.assert_close(integral, expected, rtol=1e-6, atol=1e-9)


def test_true_masked_scores_are_scaled_logits_of_the_conditional():
    """Two positions: p_t(y, w) / p_t(mask, w) = e^z / (N e1) with z = ln N + ln p(y | w)."""
    size, sigma = 3, 0.8
    graph = make_graph("absorb", size)
    joint = torch.rand(size, size, generator=torch.Generator().manual_seed(1)).double()
    joint /= joint.sum()
    law = graph.transition_probabilities(
        torch.arange(size), torch.full((size,), sigma, dtype=torch.float64)
    )
    noisy_joint = torch.einsum("ab,ax,by->xy", joint, law, law)
    for visible in range(size):
        truth = torch.log(noisy_joint[:size, visible] / noisy_joint[size, visible])
        conditional = torch.log(joint[:, visible] / joint[:, visible].sum()) + math.log(size)
        log_score = log_scores_from_logits(
            torch.cat([conditional, torch.zeros(1).double()])[None],
            torch.tensor([size]),
            torch.tensor([sigma], dtype=torch.float64),
            graph=graph,
            scaled=True,
        )
        torch.testing.assert_close(log_score[0, :size], truth, rtol=1e-10, atol=1e-10)
        assert log_score[0, size] == 0


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_overflow_is_infinite_and_no_nan(name, scaled):
    graph = make_graph(name, 50)
    noise = noise_at(SIGMAS)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS, seed=7)
    logits_MN = logits_MN.float()
    _, fine = by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    assert all(torch.isfinite(part).all() for part in fine)
    logits_MN[3] += 120.0
    _, wild = by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    assert wild.loss[3] == torch.inf and torch.isfinite(wild.loss).sum() == 7


def test_log_expm1():
    x = torch.tensor([1e-12, 1e-4, 1.0, 20.0, 2000.0], dtype=torch.float64)
    by_hand = [math.log(math.expm1(v)) for v in x[:-1].tolist()] + [2000.0]
    torch.testing.assert_close(
        log_expm1(x), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_uniform_has_no_scaled_form():
    graph = make_graph("uniform", 5)
    logits_MN, noisy_M, clean_M = rows_of(graph, SIGMAS)
    with pytest.raises(ConfigError, match="scale_by_sigma"):
        by_statistics(graph, True, logits_MN, noisy_M, clean_M, noise_at(SIGMAS))
    with pytest.raises(ConfigError, match="scale_by_sigma"):
        log_scores_from_logits(logits_MN, noisy_M, SIGMAS, graph=graph, scaled=True)


@pytest.mark.parametrize("case", ["absorb-loglinear", "uniform-geometric"])
def test_reference_numbers(case):
    golden = load_file(GOLDEN / case / "golden.safetensors")
    graph = make_graph(case.split("-")[0], 50)
    x0, xt, log_score = golden["x0"], golden["xt"], golden["log_score"]
    sigma_B, ones = golden["sigma"].double(), torch.ones(3, dtype=torch.float64)
    unweighted = RowNoise(sigma_B, ones, 1 / torch.expm1(sigma_B))
    direct = log_score_score_entropy(log_score.double(), xt, x0, unweighted, graph=graph)
    torch.testing.assert_close(direct.float(), golden["score_entropy"], rtol=1e-5, atol=1e-6)

    sigma_BL, rate_BL = (golden[k].double()[:, None].expand(3, 16) for k in ("sigma", "dsigma"))
    counted = xt == graph.mask_id if graph.mask_id is not None else torch.ones_like(xt).bool()
    rows = [v[counted] for v in (log_score[..., :50], xt, x0, sigma_BL, rate_BL)]
    logits_MN, noisy_M, clean_M, sigma_M, rate_M = rows
    noise = RowNoise(sigma_M, rate_M, rate_M / torch.expm1(sigma_M))
    scaled = graph.mask_id is not None
    if scaled:
        logits_MN = logits_MN + (torch.log(torch.expm1(sigma_M)) + math.log(50)).float()[:, None]
    _, result = by_statistics(graph, scaled, logits_MN, noisy_M, clean_M, noise)
    per_token = torch.zeros(3, 16).masked_scatter(counted, result.loss)
    torch.testing.assert_close(per_token.sum(1), golden["loss_per_sequence"], rtol=1e-5, atol=1e-6)
