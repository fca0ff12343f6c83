"""The times a sampler steps through, from 1 down to `t_end`, and the step to no noise at all."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.diffusion.schedules import Schedule
from sedd_scale.errors import ConfigError


class Step(NamedTuple):
    """From time t to an earlier s; scalars are float64 tensors on the CPU.

    `is_last` marks the denoising step, whose s carries no noise: `sigma_s` and `move_s` are 0.
    """

    number: int
    is_last: bool
    size: float
    """t - s, 0 for the denoising step."""
    time_s: float
    sigma_t: Tensor
    sigma_s: Tensor
    move_t: Tensor
    move_s: Tensor
    rate: Tensor


def grid_times(schedule: Schedule, steps: int, time_grid: str, t_end: float) -> Tensor:
    """Times [steps + 1], float64, falling from 1 to `t_end`.

    uniform: equal steps of time. cosine: t = cos(pi k / 2 steps) before it is scaled to the ends,
    so that few tokens are drawn at first (arXiv 2202.04200, section 3.3). schedule: equal steps of
    the move probability, so that about as many tokens change in each.
    """
    k = torch.arange(steps + 1, dtype=torch.float64)
    shape = torch.cos(k / steps * (math.pi / 2)) if time_grid == "cosine" else 1.0 - k / steps
    if time_grid != "schedule":
        times = t_end + (1.0 - t_end) * shape
    else:
        first, last = schedule.move_probability(torch.tensor([1.0, t_end], dtype=torch.float64))
        times = schedule.time_of_move_probability(last + (first - last) * shape)
    times[0], times[-1] = 1.0, t_end
    if not bool((times[1:] < times[:-1]).all()):
        raise ConfigError(
            f"{steps} steps of time_grid={time_grid} under the noise {schedule.name} are too many "
            "to tell their times apart: give fewer steps or another time_grid"
        )
    return times


def time_steps(schedule: Schedule, steps: int, time_grid: str, t_end: float) -> list[Step]:
    """The steps between the times of the grid, and the denoising step after them."""
    times = grid_times(schedule, steps, time_grid, t_end)
    sigma, move = schedule.sigma(times), schedule.move_probability(times)
    rate = schedule.rate(times)
    zero = torch.zeros((), dtype=torch.float64)
    ends = [*range(1, steps + 1), None]
    return [
        Step(
            number=k,
            is_last=end is None,
            size=0.0 if end is None else float(times[k] - times[end]),
            time_s=0.0 if end is None else float(times[end]),
            sigma_t=sigma[k],
            sigma_s=zero if end is None else sigma[end],
            move_t=move[k],
            move_s=zero if end is None else move[end],
            rate=rate[k],
        )
        for k, end in enumerate(ends)
    ]
