"""Samplers that fill one position after another, or groups of them: a sampler gives the turns.

first-hitting draws the time at which each position leaves the mask, once and exactly, and visits
the positions in that order. confidence, entropy and margin let the network choose: of the masked
positions those it is surest of go first, as many as a count says. left-to-right takes the next
position of every sample. The token itself follows its law in all of them.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedd_scale.sampling.batch_state import BatchState
from sedd_scale.sampling.time_grid import grid_times

# Relative difference of two values below which they count as equal.
_TIE = 1e-5


class Turn(NamedTuple):
    """What one network call fills.

    Attributes:
        number: of the step.
        rows_M: positions of the flattened [B * L]; none: the call is not made.
        time_B: what the network is shown, one for all or for each sample.
        after_B: the time that is reached, likewise.
        uniform_R: the numbers [B * L] of its draws; None: those of its number.
    """

    number: int
    rows_M: Tensor
    time_B: Tensor
    after_B: Tensor | float
    uniform_R: Tensor | None = None


Turns = Generator[Turn, None, None]


def _in_turns(turns: Callable[[BatchState], Turns]) -> Callable[[BatchState], None]:
    """Makes a sampler of a generator of turns: it fills what each asks for, in place."""

    @functools.wraps(turns)
    def run(batch: BatchState) -> None:
        with contextlib.closing(turns(batch)) as asked:  # a cache ends with an error too
            for number, rows_M, time_B, after_B, uniform_R in asked:
                if len(rows_M):
                    if uniform_R is None:
                        uniform_R = batch.draws.uniform("token", number)
                    sigma_B = batch.sigma_B(batch.model.schedule.sigma(time_B))
                    batch.put(rows_M, batch.draw_tokens(sigma_B, rows_M, uniform_R))
                    batch.report(number, after_B)

    return run


@_in_turns
def run_left_to_right(batch: BatchState) -> Turns:
    """The next position of every sample.

    What is given of a sample comes first and goes through the network at once, each further
    position alone: its keys and values are kept, so that L tokens cost L positions of the network.
    """
    length = batch.state_BL.shape[1]
    free_BL = batch.free_R.view(batch.state_BL.shape)
    time = torch.zeros((), dtype=torch.float64)
    uniform_R = batch.draws.uniform("token", 0)
    with batch.model.caching(length):
        for place in free_BL.any(dim=0).nonzero().flatten().tolist():
            rows_M = free_BL[:, place].nonzero().flatten() * length + place
            yield Turn(place, rows_M, time, 1.0 - (place + 1) / length, uniform_R)


@_in_turns
def run_first_hitting(batch: BatchState) -> Turns:
    """Positions in the order of the times at which they leave the mask.

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
    steps = batch.settings.steps
    calls_B = free_B if steps is None else free_B.clamp(max=steps)
    first_row_B = torch.arange(num, device=free_BL.device) * length
    place_L = torch.arange(length, device=free_BL.device)
    for call in range(int(calls_B.max())):
        # Events of the call: equal groups, of a sample with fewer calls none.
        begin_B = call * free_B // calls_B.clamp(min=1)
        end_B = (call + 1) * free_B // calls_B.clamp(min=1)
        end_B = torch.where(call < calls_B, end_B, begin_B)
        chosen_BL = (place_L >= begin_B[:, None]) & (place_L < end_B[:, None])
        rows_M = (order_BL + first_row_B[:, None])[chosen_BL]
        first_B1 = order_BL.gather(1, begin_B.clamp(max=length - 1)[:, None])
        move_B = move_BL.gather(1, first_B1).squeeze(1).clamp(min=0.0)
        time_B = schedule.time_of_move_probability(move_B)
        yield Turn(call, rows_M, time_B, time_B)


Count = Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""How many positions a call fills [B], of (call, masks left [B], sureness).

Asked for some samples [B], the last tells how sure the network is at their masks, [B, L].
"""


def _one_a_call(batch: BatchState) -> tuple[Count, Callable[[int, Tensor], Tensor]]:
    """One position of each sample, and the time at which so many masks are expected."""
    schedule = batch.model.schedule
    free_B = batch.free_R.view(batch.state_BL.shape).sum(dim=1).clamp(min=1)
    first = float(schedule.move_probability(torch.ones((), dtype=torch.float64)))

    def time(call: int, left_B: Tensor) -> Tensor:
        return schedule.time_of_move_probability(first * left_B.double() / free_B)

    return (lambda call, left_B, sureness: left_B.clamp(max=1)), time


def _as_scheduled(batch: BatchState, steps: int) -> tuple[Count, Callable[[int, Tensor], Tensor]]:
    """Down to as many masks as are expected after each step of the grid, and the step's time."""
    schedule, settings = batch.model.schedule, batch.settings
    free_B = batch.free_R.view(batch.state_BL.shape).sum(dim=1).double()
    times = grid_times(schedule, steps, settings.time_grid, settings.t_end)
    first = schedule.move_probability(torch.ones((), dtype=torch.float64))
    shares = [*(schedule.move_probability(times) / first).tolist(), 0.0]
    ends = [*times.tolist(), 0.0]

    def count(call: int, left_B: Tensor, sureness: Any) -> Tensor:
        return left_B - torch.minimum((free_B * shares[call + 1]).floor().long(), left_B)

    return count, lambda call, left_B: torch.full_like(left_B, ends[call], dtype=torch.float64)


@_in_turns
def run_ordered(batch: BatchState) -> Turns:
    """First where the network is surest.

    What is compared, greatest first (near ties: left to right), is of the network's own softmax(z):
    confidence its largest probability (as in arXiv 2202.04200 and 2502.09992, where it is that of
    the token drawn), margin the largest less the second largest (arXiv 2502.06768), entropy the
    entropy with a minus.
    """
    steps = batch.settings.steps
    count, time = _one_a_call(batch) if steps is None else _as_scheduled(batch, steps)
    for call in itertools.count():
        left_B = batch.masked_R().view(batch.state_BL.shape).sum(dim=1)
        if not bool(left_B.any()):
            return
        time_B = time(call, left_B)
        sure_BL = functools.partial(_sureness_of_masks, batch, time_B)
        count_B = count(call, left_B, sure_BL)
        rows_M = _first_of_each(sure_BL(count_B > 0), count_B).flatten().nonzero().squeeze(1)
        yield Turn(call, rows_M, time_B, time(call + 1, left_B - count_B))


def sureness(logits_MN: Tensor, ordering: str) -> Tensor:
    """How sure softmax(z) is, by "confidence", "margin" or "entropy": float64 [M], more is surer.

    Sums over the vocabulary are in the precision of the logits.
    """
    top_M2 = logits_MN.topk(2, dim=1).values
    shifted_MN = logits_MN - top_M2[:, :1]
    weights_MN = torch.exp(shifted_MN)
    total_M = weights_MN.sum(dim=1).double()
    if ordering == "confidence":
        return 1.0 / total_M
    if ordering == "margin":
        return -torch.expm1((top_M2[:, 1] - top_M2[:, 0]).double()) / total_M
    assert ordering == "entropy", ordering
    return weights_MN.mul_(shifted_MN).sum(dim=1).double() / total_M - torch.log(total_M)


def _sureness_of_masks(batch: BatchState, time_B: Tensor, of_B: Tensor) -> Tensor:
    """Sureness [B, L] at the masks of some samples, -inf elsewhere."""
    shape = batch.state_BL.shape
    rows_M = (batch.masked_R() & of_B.repeat_interleave(shape[1])).nonzero().squeeze(1)
    sure_R = torch.full_like(batch.flat_R, -torch.inf, dtype=torch.float64)
    sigma_B = batch.sigma_B(batch.model.schedule.sigma(time_B))
    for chunk, logits_mN in batch.outputs.chunks(batch.state_BL, sigma_B, rows_M):
        batch.law.finite.note(logits_mN.sum(dim=1))
        sure_R[rows_M[chunk]] = sureness(logits_mN, batch.settings.sampler)
    return sure_R.view(shape)


def _first_of_each(sure_BL: Tensor, count_B: Tensor) -> Tensor:
    """Bool [B, L]: the `count_B` surest positions; where rounding alone decides, the left ones.

    Positions of a sequence of masks all look alike to the network, so that ties are the rule at the
    start: which of them rounding puts first would depend on the layout.
    """
    length = sure_BL.shape[1]
    values_BL, order_BL = sure_BL.sort(dim=1, descending=True, stable=True)
    apart_BL = torch.zeros_like(order_BL)
    before_BL, after_BL = values_BL[:, :-1], values_BL[:, 1:]
    apart_BL[:, 1:] = (after_BL < before_BL - _TIE * before_BL.abs()).long()
    order_BL = order_BL.gather(1, (apart_BL.cumsum(dim=1) * length + order_BL).argsort(dim=1))
    places_BL = torch.arange(length, device=order_BL.device).expand_as(order_BL)
    chosen_BL = torch.zeros_like(order_BL, dtype=torch.bool)
    return chosen_BL.scatter(1, order_BL, places_BL < count_B[:, None])
