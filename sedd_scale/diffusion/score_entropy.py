"""Score entropy of a position from a few statistics of its logits, with its closed-form gradient.

The loss of a position with noisy state x and clean token x0 is (arXiv 2310.16834, section 3,
diffusion-weighted denoising score entropy)

    rate * sum over y != x of Q(y -> x) * ( s_y - r_y ln s_y + K(r_y) ),   K(r) = r (ln r - 1),

where s is the model's score, r_y = p(y | x0) / p(x | x0) the true ratio and Q the graph's rates.
Both graphs need only a maximum, a sum of exponentials, the logit of x0 and (uniform) a plain sum:
the scores are never stored.

Counted columns y: absorb counts all N tokens, and its rows are masked positions only (other
positions have no loss); uniform counts every token but x itself. Letters: z logits,
e1 = e^sigma - 1, a = e1 / (e1 + N).

Under uniform the logits may also be those of the clean token's law q = softmax(z) given the noisy
tokens of all other positions, the mean parametrisation (arXiv 2412.10193, section 3). Then

    s_y = (1 + w_y) / (1 + w_x),   w = q N / e1,

which is the true ratio where q is the true law, lies in [a, 1 / a] whatever the network says, and
knows of sigma by itself.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RowNoise(NamedTuple):
    """Noise at each row, [M] each; float64 keeps every digit of the weights."""

    sigma: Tensor
    """Total noise, nats."""
    rate: Tensor
    """g = d sigma / dt."""
    rate_over_expm1: Tensor
    """g / (e^sigma - 1)."""


class Statistics(NamedTuple):
    """What the loss needs to know of each row's logits, [M] each."""

    max: Tensor
    """Greatest counted logit (any finite shift near it is as good)."""
    sum_exp: Tensor
    """Sum of e^(z_y - max) over counted columns."""
    target: Tensor
    """Logit of the clean token; any finite number where that column is not counted."""
    total: Tensor | None
    """Plain sum of counted logits; None for absorb, which does not need it."""


class RowLoss(NamedTuple):
    """Loss of each row in nats and its gradient, [M] each, in the dtype of the statistics.

    Over counted columns dloss/dz_y = grad_exp * e^(z_y - max) + grad_rest + grad_target * [y = x0].
    """

    loss: Tensor
    grad_exp: Tensor
    grad_rest: Tensor
    grad_target: Tensor


class MeanStatistics(NamedTuple):
    """What the loss needs to know of each row's w under the mean parametrisation, [M] each."""

    own: Tensor
    """w of the noisy token x."""
    target: Tensor
    """w of the clean token."""
    others: Tensor
    """Sum of w over tokens other than x."""
    log_total: Tensor
    """Sum of ln(1 + w) over them."""
    share_total: Tensor
    """Sum of w / (1 + w) over them."""


class MeanRowLoss(NamedTuple):
    """Loss of each row in nats and its gradient, [M] each, in the dtype of the statistics.

    dloss/dz_y = w_y (grad_w - grad_share / (1 + w_y)) + grad_target [y = x0] for y other than x,
    and grad_own for x.
    """

    loss: Tensor
    grad_w: Tensor
    grad_share: Tensor
    grad_target: Tensor
    grad_own: Tensor


def cross_entropy_rows(statistics: Statistics, weight_M: Tensor) -> RowLoss:
    """weight * (logsumexp(z) - z_x0) of each row in nats, with its gradient coefficients.

    Every column is counted. The rows are combined in float64.
    """
    top, target = statistics.max.double(), statistics.target.double()
    sum_exp, weight = statistics.sum_exp.double(), weight_M.double()
    rows = RowLoss(
        loss=weight * ((top - target) + torch.log(sum_exp)),
        grad_exp=weight / sum_exp,
        grad_rest=torch.zeros_like(top),
        grad_target=-weight,
    )
    return _in_type_of(statistics, rows)


def clean_odds(sigma: Tensor, num_tokens: int) -> Tensor:
    """N / (e^sigma - 1), float64: how much likelier uniform noise leaves a token than gives it."""
    return num_tokens * torch.exp(-log_expm1(sigma.double()))


def mean_log_scores(logits_N: Tensor, own: Tensor, sigma: Tensor) -> Tensor:
    """Log-scores [.., N] of the uniform graph from logits of the clean token's law; own entry 0.

    own [..] are the noisy tokens, sigma is their noise. In the dtype of the logits.
    """
    odds = clean_odds(sigma, logits_N.shape[-1]).unsqueeze(-1).to(logits_N.dtype)
    log_N = torch.log1p(odds * torch.softmax(logits_N, dim=-1))
    return log_N - log_N.gather(-1, own.long().unsqueeze(-1))


def mean_row_loss(
    statistics: MeanStatistics, noise: RowNoise, *, num_tokens: int, unchanged_M: Tensor
) -> MeanRowLoss:
    """Score entropy of the uniform graph in nats under the mean parametrisation, weighted.

    [M] each, in float64 within, and `unchanged_M` marks rows whose token is the clean
    one.
    """
    noise = _in_float64(noise)
    own, target, others, log_total, share_total = (part.double() for part in statistics)
    odds = clean_odds(noise.sigma, num_tokens)
    log_a = -torch.log1p(odds)
    a = torch.exp(log_a)
    scale = noise.rate / num_tokens
    rest = 1.0 + own  # what every score is divided by
    log_rest = torch.log1p(own)
    sum_of_scores = (num_tokens - 1 + others) / rest
    # Unchanged: every other token has ratio a. Changed: x0 has 1/a = 1 + odds, the others 1.
    ratio = torch.where(unchanged_M, a, 1.0)
    same = a * (log_total - (num_tokens - 1) * (log_rest + log_a - 1.0))
    log_target = torch.log1p(target)
    differs = log_total - log_target - (num_tokens - 2) * (log_rest - 1.0)
    differs = differs + (1.0 + odds) * (log_target - log_rest + log_a + 1.0)
    sum_of_ratios = torch.where(unchanged_M, (num_tokens - 1) * a, num_tokens - 1 + odds)
    # With D = d loss / d w, d loss / d z_y = w_y (D_y - sum of D q), where q = w / odds.
    own_slope = (sum_of_ratios - sum_of_scores) / rest
    # Sum of ratio q / (1 + w) over tokens other than x; what x0 has more of it, being changed.
    extra = torch.where(unchanged_M, 0.0, target / (1.0 + target))
    weighed = ratio * share_total / odds + extra
    own_share, other_share = own / odds, others / odds
    return MeanRowLoss(
        *(
            part.to(statistics.own.dtype)
            for part in (
                scale * (sum_of_scores - torch.where(unchanged_M, same, differs)),
                scale * (own_share / rest + weighed - own_slope * own_share),
                scale * ratio,
                -scale * odds * extra,
                scale * own * (own_slope * other_share - other_share / rest + weighed),
            )
        )
    )


def log_expm1(x: Tensor) -> Tensor:
    """ln(e^x - 1) for x > 0, exact for small x and free of overflow for large x."""
    return x + torch.log(-torch.expm1(-x))


def absorb_rows(statistics: Statistics, noise: RowNoise) -> RowLoss:
    """Score entropy of masked rows whose logits are log-scores; see `row_law.RowLaw.rows`."""
    noise = _in_float64(noise)
    top, target = statistics.max.double(), statistics.target.double()
    log_sum = torch.log(statistics.sum_exp.double())
    # g * (e^lse - r z[x0] + K(r)) with r = 1/e1 and g r the weight.
    weight, log_odds = noise.rate_over_expm1, log_expm1(noise.sigma)
    loss = noise.rate * torch.exp(top + log_sum) - weight * (target + log_odds + 1.0)
    grad_exp = noise.rate * torch.exp(top)
    return _in_type_of(statistics, RowLoss(loss, grad_exp, torch.zeros_like(loss), -weight))


def scaled_absorb_rows(statistics: Statistics, noise: RowNoise, num_tokens: int) -> RowLoss:
    """The same whose log-scores are z - ln(e^sigma - 1) - ln N; the shift cancels on paper."""
    top, target = statistics.max.double(), statistics.target.double()
    log_sum = torch.log(statistics.sum_exp.double())
    weight = noise.rate_over_expm1.double()
    # Cross-entropy plus the price of not being normalised.
    cross_entropy = (top - target) + log_sum
    excess = top - math.log(num_tokens)
    loss = weight * (cross_entropy + _expm1_minus(excess + log_sum))
    grad_exp = weight * torch.exp(excess)
    return _in_type_of(statistics, RowLoss(loss, grad_exp, torch.zeros_like(loss), -weight))


def uniform_rows(
    statistics: Statistics, noise: RowNoise, num_tokens: int, unchanged_M: Tensor
) -> RowLoss:
    """Score entropy of the uniform graph whose logits are log-scores."""
    noise = _in_float64(noise)
    assert statistics.total is not None, "the uniform graph needs the sum of the counted logits"
    top, target = statistics.max.double(), statistics.target.double()
    score_sum = torch.exp(top) * statistics.sum_exp.double()
    total = statistics.total.double()
    scale = noise.rate / num_tokens
    # N / e1 and not e1 / N: a = 1 / (1 + N / e1) then never cancels, nor does ln a.
    odds = num_tokens * torch.exp(-log_expm1(noise.sigma))
    log_a = -torch.log1p(odds)
    a = 1.0 / (1.0 + odds)
    # Unchanged: every other token has ratio a. Sum of e^z - a z + K(a).
    same = score_sum - a * (total - (num_tokens - 1) * (log_a - 1.0))
    # Changed: x0 has ratio 1/a = 1 + odds, the N - 2 others have ratio 1.
    others = score_sum - (total - target) - (num_tokens - 2)
    differs = others - (1.0 + odds) * (target + log_a + 1.0)
    zero = torch.zeros_like(scale)
    rows = RowLoss(
        loss=scale * torch.where(unchanged_M, same, differs),
        grad_exp=scale * torch.exp(top),
        grad_rest=-scale * torch.where(unchanged_M, a, 1.0),
        grad_target=torch.where(unchanged_M, zero, -noise.rate_over_expm1),
    )
    return _in_type_of(statistics, rows)


def _in_float64(noise: RowNoise) -> RowNoise:
    return RowNoise(*(part.double() for part in noise))


def _in_type_of(statistics: Statistics, rows: RowLoss) -> RowLoss:
    return RowLoss(*(part.to(statistics.max.dtype) for part in rows))


def _expm1_minus(u: Tensor) -> Tensor:
    """e^u - 1 - u: non-negative, u^2 / 2 near 0."""
    series = u.square() * (
        1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u / 5040))))
    )
    return torch.where(u.abs() < 1e-2, series, torch.expm1(u) - u)
