"""Reverse-step laws as float64 probability tables, and exact draws from them.

A step goes from time t to an earlier time s at one position whose noisy state is x. The tables are
the formulas as they stand: rows sum to 1, but a step too large for the rate (Euler), or a score
that is no ratio of probabilities (an untrained model), can make an entry negative.
`as_distribution` clamps those, as a draw must.

Sources: arXiv 2310.16834, section 4 (Euler, Tweedie tau-leaping); arXiv 2406.07524, section 3.2
(ancestral steps of absorb); arXiv 2503.00307, section 3 (remasking). States x have shape [..],
noise levels the leading shape of x, log-scores and tables [.., V].
"""

import math

import torch
from torch import Tensor

from sedd_scale.diffusion.graphs import Absorb, Graph, Uniform, over_positions
from sedd_scale.diffusion.score_entropy import log_expm1


def analytic_probabilities(
    log_score_V: Tensor, states: Tensor, sigma_t: Tensor, sigma_s: Tensor, graph: Graph
) -> Tensor:
    """Tweedie step from noise sigma_t to sigma_s <= sigma_t: raw table [.., V], rows sum to 1.

    It is the exact posterior of x_s given x_t at that position when the scores are the true ratios.
    """
    score_V = _scores(log_score_V, states)
    step = over_positions(sigma_t.double() - sigma_s.double(), states).unsqueeze(-1)
    if isinstance(graph, Absorb):
        return _absorb_table(torch.expm1(step) * score_V, states, graph)
    assert isinstance(graph, Uniform), graph
    # e^(-step Q) s, the ratios at s over the probability of x at t, times the chance of the jump y
    # -> x.
    staggered_V = (score_V + torch.expm1(-step) * score_V.mean(-1, keepdim=True)) * torch.exp(step)
    return staggered_V * graph.transition_probabilities(
        states, step.squeeze(-1).expand(states.shape)
    )


def euler_probabilities(
    log_score_V: Tensor, states: Tensor, step_size: float | Tensor, rate: Tensor, graph: Graph
) -> Tensor:
    """Euler step of `step_size` in time at noise rate `rate`: raw table [.., V], rows sum to 1.

    Each other state y gets step_size * rate * Q(y -> x) * s_y, the state itself what is left.
    """
    score_V = _scores(log_score_V, states)
    scale = over_positions(torch.as_tensor(rate).double() * step_size, states).unsqueeze(-1)
    jumps_V = scale * graph.incoming_rates(states) * score_V
    stay = 1.0 - jumps_V.sum(-1, keepdim=True)
    return jumps_V.scatter(-1, states.long().unsqueeze(-1), stay)


def denoise_probabilities(
    log_score_V: Tensor, states: Tensor, sigma: Tensor, graph: Graph
) -> Tensor:
    """Last step, from noise sigma to none: table [.., V], rows sum to 1.

    absorb: a masked position takes a real token with probability proportional to its score (the
    mask's column is 0); uniform: the analytic step to sigma 0, raw.
    """
    if not isinstance(graph, Absorb):
        return analytic_probabilities(log_score_V, states, sigma, torch.zeros_like(sigma), graph)
    law_N = torch.softmax(log_score_V[..., : graph.num_tokens].double(), dim=-1)
    return _absorb_table(torch.cat([law_N, torch.zeros_like(law_N[..., :1])], -1), states, graph)


def ancestral_probabilities(
    log_score_V: Tensor,
    states: Tensor,
    move_t: Tensor,
    move_s: Tensor,
    graph: Absorb,
    *,
    remask: float = 0.0,
) -> Tensor:
    """Absorb's step in the normalised parametrisation: table [.., V], rows sum to 1.

    A mask becomes a real token with probability proportional to its score; whether it does, and
    whether a token is taken back, is up to the schedule alone: see `ancestral_chances`.

    Args:
        move_t, move_s: move probabilities m(t) and m(s) <= m(t).
        remask: how often a token is taken back over the whole run, on average.
    """
    leave, take_back = (
        over_positions(chance, states).unsqueeze(-1)
        for chance in ancestral_chances(move_t, move_s, remask=remask)
    )
    law_N = torch.softmax(log_score_V[..., : graph.num_tokens].double(), dim=-1)
    leave_V = torch.cat([leave * law_N, torch.zeros_like(law_N[..., :1])], -1)
    table_V = _absorb_table(leave_V, states, graph)
    masked = (states == graph.mask_id).unsqueeze(-1)
    kept_V = table_V * (1.0 - take_back)
    kept_V[..., graph.mask_id] += take_back.squeeze(-1)
    return torch.where(masked, table_V, kept_V)


def ancestral_chances(
    move_t: Tensor, move_s: Tensor, *, remask: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Chances from t to s that a mask becomes a token, and that a token becomes the mask; float64.

    With b = min(remask (m_t - m_s), m_s / (1 - m_t), 1), a token is taken back with chance b and a
    mask leaves with chance (m_t - m_s + b (1 - m_t)) / m_t: whatever b, a position that is masked
    with probability m_t is then masked with probability m_s. Source: arXiv 2503.00307, section 3.1,
    where alpha = 1 - m.
    """
    move_t, move_s = move_t.double(), move_s.double()
    most = (move_s / (1.0 - move_t).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    take_back = torch.minimum(remask * (move_t - move_s), most)
    leave = ((move_t - move_s) + take_back * (1.0 - move_t)) / move_t
    return leave.clamp(max=1.0), take_back


def as_distribution(table_V: Tensor) -> Tensor:
    """Clamp negative entries of raw rows to 0 and scale the rows to sum to 1."""
    clamped_V = table_V.double().clamp(min=0.0)
    return clamped_V / clamped_V.sum(-1, keepdim=True)


def absorb_step_rows(logits_MN: Tensor, log_factor_M: Tensor) -> tuple[Tensor, Tensor]:
    """One absorb step of masked positions: float64 probabilities [M, N] of tokens, [M] of staying.

    P(y) = factor * e^(z_y). Where that adds up to more than 1, it is scaled to 1 and the mask does
    not stay. Factors: `analytic_log_factor`, `euler_log_factor`.
    """
    logits_MN = logits_MN.double()
    log_leave_M = torch.logsumexp(logits_MN, -1) + log_factor_M.double()
    log_scale_M = log_factor_M.double() - log_leave_M.clamp(min=0.0)
    return torch.exp(logits_MN + log_scale_M[:, None]), -torch.expm1(log_leave_M.clamp(max=0.0))


def analytic_log_factor(
    sigma_t: Tensor, sigma_s: Tensor, *, num_tokens: int, scaled: bool
) -> Tensor:
    """Analytic step for `absorb_step_rows`: ln of expm1(sigma_t - sigma_s) [/ (N expm1(sigma_t))].

    The divisor belongs to scaled logits. Float64, of the shape of the noise levels.
    """
    log_factor = log_expm1(sigma_t.double() - sigma_s.double())
    if scaled:
        log_factor = log_factor - log_expm1(sigma_t.double()) - math.log(num_tokens)
    return log_factor


def euler_log_factor(
    step_size: float | Tensor,
    *,
    rate: Tensor,
    rate_over_expm1: Tensor,
    num_tokens: int,
    scaled: bool,
) -> Tensor:
    """Euler step for `absorb_step_rows`: ln of step_size * rate [/ (N expm1(sigma))].

    The divisor belongs to scaled logits. Float64, of the shape of the rates.
    """
    if scaled:
        return torch.log(rate_over_expm1.double() * step_size) - math.log(num_tokens)
    return torch.log(rate.double() * step_size)


def draw_categorical(
    probabilities_V: Tensor, uniform: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Int64 states [..] drawn from non-negative rows [.., V] by inverting their cumulative sums.

    `uniform` [..] lies in [0, 1) and should be float64, as `dtype` should: single precision cuts
    the tail off and so lowers the temperature (arXiv 2409.02908). Rows need not sum to 1. A state
    of probability 0 is never drawn.
    """
    cumulative_V = probabilities_V.to(dtype).cumsum(-1)
    total = cumulative_V[..., -1:]
    # Rounding may lift u * total to total itself, past every state.
    height = torch.minimum(uniform.to(dtype).unsqueeze(-1) * total, torch.nextafter(total, -total))
    return torch.searchsorted(cumulative_V, height.contiguous(), right=True).squeeze(-1)


def _scores(log_score_V: Tensor, states: Tensor) -> Tensor:
    """e^log_score in float64, 1 at the own entry whatever it held."""
    return log_score_V.double().exp().scatter(-1, states.long().unsqueeze(-1), 1.0)


def _absorb_table(leave_V: Tensor, states: Tensor, graph: Absorb) -> Tensor:
    """Masked rows: chances of leaving, the mask keeps the rest. Other rows: the state stays."""
    masked = (states == graph.mask_id).unsqueeze(-1)
    mask_state = torch.full_like(states, graph.mask_id, dtype=torch.int64).unsqueeze(-1)
    leave_V = torch.where(masked, leave_V.scatter(-1, mask_state, 0.0), 0.0)
    stay = 1.0 - leave_V.sum(-1, keepdim=True)
    return leave_V.scatter(-1, states.long().unsqueeze(-1), stay)
