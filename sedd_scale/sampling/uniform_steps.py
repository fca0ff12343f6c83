"""Steps of the uniform graph: every free position may jump to another token at every step.

Whether a position jumps needs two sums over its row; only those that do need a draw from the
vocabulary. Letters as in `diffusion.reverse`: s_y = e^(z_y) for y other than x, s_x = 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.diffusion.score_entropy import mean_log_scores
from sedd_scale.sampling.batch_state import BatchState
from sedd_scale.sampling.time_grid import Step


class JumpRows(NamedTuple):
    """The law of rows of one step: chance of a jump, and unnormalised weights of where to."""

    leave_M: Tensor
    """Float64 [M]."""
    weights_MN: Tensor
    """Non-negative [M, N] in the precision of the logits, 0 at the row's own token."""


def run_uniform(batch: BatchState) -> None:
    """All steps of analytic or Euler sampling, and the denoising step, in place.

    Raises:
        CheckpointError: the network's outputs are not finite.
    """
    for step in batch.steps():
        if uniform_step(batch, step):
            batch.report(step.number, step.time_s)


def uniform_step(batch: BatchState, step: Step) -> bool:
    """One step in place; whether anything changed."""
    rows_M = batch.free_R.nonzero().squeeze(1)
    if not len(rows_M):
        return False
    leave_R, token_R = (batch.draws.uniform(name, step.number) for name in ("leave", "token"))
    before_M = batch.flat_R[rows_M]
    after_M = before_M.clone()
    law = euler_rows if batch.settings.sampler == "euler" and not step.is_last else analytic_rows
    sigma_B = batch.sigma_B(step.sigma_t)
    for chunk, logits_mN in batch.outputs.chunks(batch.state_BL, sigma_B, rows_M):
        own_m = before_M[chunk]
        if batch.model.law.of_clean_token:
            logits_mN = mean_log_scores(logits_mN, own_m, step.sigma_t.to(own_m.device))
        leave_m, weights_mN = law(logits_mN, own_m, step)
        batch.law.finite.note(leave_m)
        jumping = leave_R[rows_M[chunk]] < leave_m
        after_M[chunk][jumping] = batch.law.draw_weights(
            weights_mN[jumping], token_R[rows_M[chunk][jumping]]
        )
    batch.put(rows_M, after_M)
    return bool((before_M != after_M).any())


def analytic_rows(logits_MN: Tensor, own_M: Tensor, step: Step) -> JumpRows:
    """Tweedie step: P(y) as r_y T(x, y), r_y = s_y - (1 - e^-d) mean(s); a negative r_y is 0."""
    num_tokens = logits_MN.shape[1]
    difference = step.sigma_t - step.sigma_s
    decay = float(torch.exp(-difference))
    moved = float(-torch.expm1(-difference))
    score_MN, own_score_M = _shifted_scores(logits_MN, own_M)
    total_M = score_MN.sum(dim=1).double() + own_score_M
    spread_M = moved / num_tokens * total_M
    own_M1 = own_M[:, None]
    weights_MN = score_MN.sub_(spread_M.to(score_MN.dtype)[:, None]).clamp_(min=0.0)
    weights_MN.scatter_(1, own_M1, 0.0)
    jump_M = moved / num_tokens * weights_MN.sum(dim=1).double()
    stay_M = (decay + moved / num_tokens) * (own_score_M - spread_M).clamp(min=0.0)
    return JumpRows(jump_M / (jump_M + stay_M), weights_MN)


def euler_rows(logits_MN: Tensor, own_M: Tensor, step: Step) -> JumpRows:
    """Euler step: P(y) = (t - s) g s_y / N, scaled to 1 where that adds up to more."""
    score_MN, own_score_M = _shifted_scores(logits_MN, own_M)
    scale = step.size * float(step.rate) / logits_MN.shape[1]
    jump_M = scale * score_MN.sum(dim=1).double()
    return JumpRows((jump_M / own_score_M).clamp(max=1.0), score_MN)


def _shifted_scores(logits_MN: Tensor, own_M: Tensor) -> tuple[Tensor, Tensor]:
    """e^(z_y - c) with 0 at the own token [M, N], and e^(-c), the own score, float64 [M].

    c is the greater of 0 and the greatest z, so that nothing overflows.
    """
    others_MN = logits_MN.scatter(1, own_M[:, None], -torch.inf)
    shift_M = others_MN.amax(dim=1).clamp(min=0.0)
    score_MN = others_MN.sub_(shift_M[:, None]).exp_()
    return score_MN, torch.exp(-shift_M.double())
