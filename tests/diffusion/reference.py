"""Definitions on whole tables, which tests compare what runs with.

Losses from whole log-scores; laws of reverse steps as float64 probability tables. A step goes from
time t to an earlier time s at one position whose noisy state is x. Tables are the formulas as they
are: rows sum to 1, but a step too large for the rate (Euler), or a score that is no ratio of
probabilities (an untrained model), can make an entry negative. `as_distribution` clamps those, as a
draw must.

Sources: arXiv 2310.16834, sections 3 and 4 (score entropy; Euler, Tweedie tau-leaping); arXiv
2406.07524, section 3.2 (ancestral steps of absorb); arXiv 2503.00307, section 3 (remasking). States
x have shape [..], noise levels the leading shape of x, log-scores and tables [.., V].
"""

import math
from typing import Any

import torch
from torch import Tensor

from sedd_scale.diffusion.corruption import Draw, NoisyBatch, SampleIds
from sedd_scale.diffusion.graphs import Absorb, Graph, Uniform, over_positions
from sedd_scale.diffusion.objectives import ScoreEntropy
from sedd_scale.diffusion.reverse import ancestral_chances
from sedd_scale.diffusion.row_law import row_law
from sedd_scale.diffusion.schedules import Schedule
from sedd_scale.diffusion.score_entropy import RowLoss, RowNoise, Statistics


def row_loss(
    statistics: Statistics,
    noise: RowNoise,
    *,
    graph: Graph,
    scaled: bool,
    unchanged_M: Tensor | None = None,
) -> RowLoss:
    """What `RowLaw.rows` gives for a graph by name of its parametrisation."""
    return row_law(graph, scaled=scaled).rows(statistics, noise, unchanged_M)


def corrupt_batch(
    clean_BL: Tensor,
    *,
    sample_ids_B: SampleIds,
    step: int,
    seed: int,
    global_batch: int,
    stream: str = "train",
    **process: Any,
) -> NoisyBatch:
    """What score entropy is trained on; `process` is graph, schedule, t_min and perhaps t_B."""
    draw = Draw(seed, step, sample_ids_B, global_batch=global_batch, stream=stream)
    return ScoreEntropy().corrupt(clean_BL, draw, **process)


def log_scores_from_logits(
    logits_V: Tensor,
    states: Tensor,
    sigma: Tensor,
    *,
    graph: Graph,
    scaled: bool,
    mean: bool = False,
) -> Tensor:
    """What `RowLaw.log_scores` gives, likewise; of a mean, where a constant is open, of any."""
    if mean and graph.mask_id is not None:
        log_sum = logits_V[..., : graph.num_tokens].logsumexp(-1, keepdim=True)
        logits_V = logits_V - log_sum + math.log(graph.num_tokens)
    return row_law(graph, scaled=scaled, mean=mean).log_scores(logits_V, states, sigma)


def noise_columns(schedule: Schedule, t_B: Tensor) -> Tensor:
    """sigma, its rate g and g / (e^sigma - 1) at times t, float64 [B, 3]."""
    return ScoreEntropy().noise_columns(schedule, t_B, training=False)


def incoming_rates(graph: Graph, states: Tensor) -> Tensor:
    """Rate, per unit of noise, of jumps from each other state into `states`: float64 [.., V].

    The own entry is 0.
    """
    own_V = torch.nn.functional.one_hot(states.long(), graph.num_states).double()
    if isinstance(graph, Absorb):
        return (1.0 - own_V) * (states == graph.mask_id).unsqueeze(-1)
    assert isinstance(graph, Uniform), graph
    return (1.0 - own_V) / graph.num_tokens


def row_statistics(logits_MN: Tensor, target_M: Tensor, own_M: Tensor | None = None) -> Statistics:
    """Statistics of rows of N logits; `own_M` (uniform: the noisy token) is not to be counted."""
    counted_MN = logits_MN
    if own_M is not None:
        # Excluded inside the reductions: subtracting it afterwards would cancel.
        counted_MN = logits_MN.scatter(1, own_M[:, None], -torch.inf)
    max_M = counted_MN.amax(1)
    sum_exp_M = torch.exp(counted_MN - max_M[:, None]).sum(1)
    target = logits_MN.gather(1, target_M[:, None]).squeeze(1)
    if own_M is None:
        return Statistics(max_M, sum_exp_M, target, None)
    return Statistics(max_M, sum_exp_M, target, logits_MN.scatter(1, own_M[:, None], 0.0).sum(1))


def log_score_score_entropy(
    log_score_BLV: Tensor, noisy_BL: Tensor, clean_BL: Tensor, noise: RowNoise, *, graph: Graph
) -> Tensor:
    """Score entropy [B, L] in nats by its definition, from whole log-scores; differentiable.

    noise holds [B] or [B, L]. The result has the dtype of the log-scores; the true ratios come from
    the forward law in float64. Source: arXiv 2310.16834, section 3 (diffusion-weighted denoising
    score entropy).
    """
    rates_BLV = incoming_rates(graph, noisy_BL)
    law_BLV = graph.transition_probabilities(clean_BL, noise.sigma)
    ratio_BLV = law_BLV / law_BLV.gather(-1, noisy_BL.unsqueeze(-1))
    constant_BLV = torch.special.xlogy(ratio_BLV, ratio_BLV) - ratio_BLV
    weight_BLV = over_positions(noise.rate.double(), noisy_BL).unsqueeze(-1) * rates_BLV
    dtype = log_score_BLV.dtype
    cross_BLV = torch.where(ratio_BLV > 0, ratio_BLV.to(dtype) * log_score_BLV, 0.0)
    term_BLV = log_score_BLV.exp() - cross_BLV + constant_BLV.to(dtype)
    return torch.where(rates_BLV > 0, weight_BLV.to(dtype) * term_BLV, 0.0).sum(-1)


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
    jumps_V = scale * incoming_rates(graph, states) * score_V
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
