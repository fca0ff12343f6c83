"""Samplers of the absorbing graph that choose which positions are filled next, and in how many.

first-hitting draws the time at which each position leaves the mask, once and exactly, and visits
the positions in that order. confidence, entropy and margin let the network choose: of the masked
positions those it is surest of go first. Each network call fills one position of every sample, or
a group of them where fewer calls are asked for.
"""

import torch
from torch import Tensor

from sedd_scale.sampling.batch_state import BatchState
from sedd_scale.sampling.time_grid import grid_times
from sedd_scale.sampling.token_law import check_finite

# Relative difference of two values below which they count as equal.
_TIE = 1e-5


def run_first_hitting(batch: BatchState) -> None:
    """Fill positions in the order of the times at which they leave the mask, in place.

    A position's time has move probability m(1) U with U uniform: in order, n masks are left until
    m falls by a factor U^(1/n). Source: arXiv 2409.02908, section 4. The network sees the time of
    the first event of a group, and its tokens before it.
    """
    schedule, (num, length) = batch.model.schedule, batch.state_BL.shape
    start = schedule.move_probability(torch.ones((), dtype=torch.float64))
    free_BL = batch.free_R.view(num, length)
    move_BL = batch.draws.uniform("time", 0).double().view(num, length) * start.to(free_BL.device)
    move_BL = torch.where(free_BL, move_BL, -1.0)
    order_BL = move_BL.argsort(dim=1, descending=True, stable=True)
    free_B = free_BL.sum(dim=1)
    calls_B = _calls(free_B, batch.settings.steps)
    first_row_B = torch.arange(num, device=free_BL.device) * length
    place_L = torch.arange(length, device=free_BL.device)
    for call in range(int(calls_B.max()) if num else 0):
        # Events of the call: equal groups, of a sample with fewer calls none.
        begin_B = call * free_B // calls_B.clamp(min=1)
        end_B = (call + 1) * free_B // calls_B.clamp(min=1)
        end_B = torch.where(call < calls_B, end_B, begin_B)
        chosen_BL = (place_L >= begin_B[:, None]) & (place_L < end_B[:, None])
        rows_M = (order_BL + first_row_B[:, None])[chosen_BL]
        first_B1 = order_BL.gather(1, begin_B.clamp(max=length - 1)[:, None])
        move_B = move_BL.gather(1, first_B1).squeeze(1).clamp(min=0.0)
        time_B = schedule.time_of_move_probability(move_B)
        uniform_R = batch.draws.uniform("token", call)
        tokens_M = batch.draw_tokens(batch.sigma_B(schedule.sigma(time_B)), rows_M, uniform_R)
        batch.put(rows_M, tokens_M)
        batch.report(call, time_B)


def run_ordered(batch: BatchState) -> None:
    """Fill first where the network is surest, in place; the token itself follows its law.

    What is compared, greatest first (near ties: left to right), is of the network's own softmax(z):
    confidence its largest probability (as in arXiv 2202.04200 and 2502.09992, where it is that of
    the token drawn), margin the largest less the second largest (arXiv 2502.06768), entropy the
    entropy with a minus.
    """
    schedule, (num, length) = batch.model.schedule, batch.state_BL.shape
    free_B = batch.free_R.view(num, length).sum(dim=1)
    first = schedule.move_probability(torch.ones((), dtype=torch.float64))
    steps = batch.settings.steps
    grid: list[tuple[float, float, float]] = []
    if steps is not None:
        times = grid_times(schedule, steps, batch.settings.time_grid, batch.settings.t_end)
        shares = (schedule.move_probability(times) / first).tolist()
        ends = times.tolist()
        grid = list(zip(ends, [*ends[1:], 0.0], [*shares[1:], 0.0]))
    for call in range(len(grid) if steps is not None else length):
        left_B = batch.masked_R().view(num, length).sum(dim=1)
        if not bool(left_B.any()):
            return
        if steps is None:
            keep_B = (left_B - 1).clamp(min=0)
            time_B, after_B = (
                schedule.time_of_move_probability(
                    float(first) * masks_B.double() / free_B.clamp(min=1)
                )
                for masks_B in (left_B, keep_B)
            )
        else:
            begin, end, share = grid[call]
            # As many masks as the schedule expects after the step, rounded down.
            keep_B = torch.minimum((free_B.double() * share).floor().long(), left_B)
            time_B, after_B = (
                torch.full_like(free_B, time, dtype=torch.float64) for time in (begin, end)
            )
        rows_M = _surest(batch, schedule.sigma(time_B), left_B - keep_B)
        if len(rows_M):
            uniform_R = batch.draws.uniform("token", call)
            sigma_B = batch.sigma_B(schedule.sigma(time_B))
            batch.put(rows_M, batch.draw_tokens(sigma_B, rows_M, uniform_R))
            batch.report(call, after_B)


def sureness(logits_MN: Tensor, ordering: str) -> Tensor:
    """How sure softmax(z) is, by "confidence", "margin" or "entropy": float64 [M], more is surer.

    Sums over the vocabulary are in the precision of the logits.
    """
    top_M2 = logits_MN.topk(2, dim=1).values
    shifted_MN = logits_MN - top_M2[:, :1]
    weights_MN = torch.exp(shifted_MN)
    total_M = weights_MN.sum(dim=1).double()
    check_finite(total_M)
    if ordering == "confidence":
        return 1.0 / total_M
    if ordering == "margin":
        return -torch.expm1((top_M2[:, 1] - top_M2[:, 0]).double()) / total_M
    assert ordering == "entropy", ordering
    return weights_MN.mul_(shifted_MN).sum(dim=1).double() / total_M - torch.log(total_M)


def _surest(batch: BatchState, sigma_B: Tensor, count_B: Tensor) -> Tensor:
    """Rows of the `count_B` masked positions of each sample that the network is surest of."""
    num, length = batch.state_BL.shape
    rows_M = (batch.masked_R() & (count_B > 0).repeat_interleave(length)).nonzero().squeeze(1)
    sure_R = torch.full_like(batch.flat_R, -torch.inf, dtype=torch.float64)
    sigma_B = batch.sigma_B(sigma_B)
    for chunk, logits_mN in batch.outputs.chunks(batch.state_BL, sigma_B, rows_M):
        sure_R[rows_M[chunk]] = sureness(logits_mN, batch.settings.sampler)
    order_BL = _order_with_ties(sure_R.view(num, length))
    places_BL = torch.arange(length, device=order_BL.device).expand(num, -1)
    chosen_BL = torch.zeros_like(order_BL, dtype=torch.bool)
    chosen_BL = chosen_BL.scatter(1, order_BL, places_BL < count_B[:, None])
    return chosen_BL.flatten().nonzero().squeeze(1)


def _order_with_ties(sure_BL: Tensor) -> Tensor:
    """Positions from the greatest value down; where rounding alone decides, from left to right.

    Positions of a sequence of masks all look alike to the network, so that ties are the rule at the
    start: which of them rounding puts first would depend on the layout.
    """
    length = sure_BL.shape[1]
    values_BL, order_BL = sure_BL.sort(dim=1, descending=True, stable=True)
    apart_BL = torch.zeros_like(order_BL)
    before_BL, after_BL = values_BL[:, :-1], values_BL[:, 1:]
    apart_BL[:, 1:] = (after_BL < before_BL - _TIE * before_BL.abs()).long()
    return order_BL.gather(1, (apart_BL.cumsum(dim=1) * length + order_BL).argsort(dim=1))


def _calls(free_B: Tensor, steps: int | None) -> Tensor:
    """Network calls of each sample: one a free position, or `steps` where that is fewer."""
    return free_B if steps is None else free_B.clamp(max=steps)
