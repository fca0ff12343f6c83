"""Steps of the absorbing graph along a grid of times: analytic, Euler, ancestral, remasking.

In each, a masked position leaves the mask with some probability, and the token it then gets follows
softmax(z) (as `TokenLaw` tempers it) whatever the step. So only positions that leave need a draw
from the vocabulary. Of analytic and Euler steps the probability of leaving is a multiple of
sum e^z: one number per row. Of ancestral steps it is the schedule's alone, so that the network has
only to be asked about positions that are known to leave.
"""

import torch
from torch import Tensor

from sedd_scale.diffusion.reverse import (
    analytic_log_factor,
    ancestral_chances,
    euler_log_factor,
)
from sedd_scale.sampling.batch_state import BatchState
from sedd_scale.sampling.head_outputs import row_log_sum
from sedd_scale.sampling.time_grid import Step


def run_absorb(batch: BatchState) -> None:
    """All steps of analytic, Euler or ancestral sampling, in place.

    Raises:
        CheckpointError: the network's outputs are not finite.
    """
    settings = batch.settings
    # ln sum e^z of each position, as of its sequence's last run through the network.
    log_sum_R = torch.zeros(batch.flat_R.shape, dtype=torch.float64, device=batch.model.device)
    for step in batch.steps():
        masked_R = batch.masked_R()
        if settings.remask == 0 and not bool(masked_R.any()):
            return
        if settings.sampler == "ancestral" or step.is_last:
            changed = ancestral_step(batch, step, masked_R)
        else:
            changed = score_step(batch, step, masked_R, log_sum_R)
        if changed:
            batch.report(step.number, step.time_s)


def ancestral_step(batch: BatchState, step: Step, masked_R: Tensor) -> bool:
    """One step whose moves depend on the schedule alone; whether anything changed.

    The last step, to no noise, leaves no mask: there every sampler is this one.
    """
    leave, take_back = ancestral_chances(step.move_t, step.move_s, remask=batch.settings.remask)
    if step.is_last:
        leaving_R = masked_R
    else:
        leaving_R = masked_R & (batch.draws.uniform("leave", step.number) < float(leave))
    rows_M = leaving_R.nonzero().squeeze(1)
    back_M = rows_M[:0]
    if float(take_back) > 0 and not step.is_last:
        back_R = batch.draws.uniform("remask", step.number) < float(take_back)
        back_M = (back_R & batch.free_R & ~masked_R).nonzero().squeeze(1)
    if len(rows_M):
        uniform_R = batch.draws.uniform("token", step.number)
        tokens_M = batch.draw_tokens(batch.sigma_B(step.sigma_t), rows_M, uniform_R)
        batch.put(rows_M, tokens_M)
    if len(back_M):
        assert batch.model.graph.mask_id is not None
        batch.put(back_M, torch.full_like(back_M, batch.model.graph.mask_id))
    return len(rows_M) + len(back_M) > 0


def score_step(batch: BatchState, step: Step, masked_R: Tensor, log_sum_R: Tensor) -> bool:
    """One analytic or Euler step, whose chance of leaving is a multiple of sum e^z.

    A sum of probabilities above 1 (an untrained network) leaves no chance of staying. Sequences
    whose input is as it was keep their sums in `log_sum_R`: of those only rows that leave need the
    head again.
    """
    log_factor = float(_log_factor(batch, step))
    sigma_B = batch.sigma_B(step.sigma_t)
    stale_R = batch.outputs.stale(batch.state_BL, sigma_B).repeat_interleave(
        batch.state_BL.shape[1]
    )
    leave_R, token_R = (batch.draws.uniform(name, step.number) for name in ("leave", "token"))
    rows, tokens = [], []
    known_M = (masked_R & ~stale_R).nonzero().squeeze(1)
    known_M = known_M[leave_R[known_M] < torch.exp(log_sum_R[known_M] + log_factor)]
    if len(known_M):
        rows.append(known_M)
        tokens.append(batch.draw_tokens(sigma_B, known_M, token_R))
    new_M = (masked_R & stale_R).nonzero().squeeze(1)
    for chunk, logits_mN in batch.outputs.chunks(batch.state_BL, sigma_B, new_M):
        rows_m = new_M[chunk]
        log_sum_m = row_log_sum(logits_mN)
        batch.law.finite.note(log_sum_m)
        log_sum_R[rows_m] = log_sum_m
        leaving = leave_R[rows_m] < torch.exp(log_sum_m + log_factor)
        rows.append(rows_m[leaving])
        tokens.append(batch.law.draw(logits_mN[leaving], token_R[rows_m[leaving]]))
    if not any(map(len, rows)):
        batch.law.finite.check()  # of numbers that are none nothing leaves
        return False
    batch.put(torch.cat(rows), torch.cat(tokens))
    return True


def _log_factor(batch: BatchState, step: Step) -> Tensor:
    """ln of what e^z is multiplied by to be a probability of leaving."""
    law = batch.model.law
    if batch.settings.sampler == "euler":
        return euler_log_factor(step.size, sigma=step.sigma_t, rate=step.rate, law=law)
    return analytic_log_factor(step.sigma_t, step.sigma_s, law=law)
