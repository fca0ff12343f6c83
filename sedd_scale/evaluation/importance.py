"""What the bound's integral is sampled at, and how much each sample counts.

Times: a uniform u in [0, 1) becomes a time with a weight, so that the mean of weight * integrand(t)
is the integral over [t_min, 1]. Corruptions: masks are drawn in proportion to their number, which
makes a sum over masked tokens a mean over them, whatever their number. Under the uniform graph, at
small t most sequences stay whole, and the few that do not carry all of the loss; sampling those on
purpose, with a weight, bounds what a draw can add.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_scale.diffusion.schedules import Schedule

# Enough halvings of [0, 1] for every bit of a float64.
_HALVINGS = 60


def uniform_times(u_K: Tensor, *, t_min: float) -> tuple[Tensor, Tensor]:
    """Uniform times with weight 1: their mean is that of the integrand over [t_min, 1]."""
    return t_min + (1.0 - t_min) * u_K, torch.ones_like(u_K)


def weighted_times(
    u_K: Tensor, schedule: Schedule, *, t_min: float, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Times at the quantiles u of a density that follows the integrand, and 1 / density.

    On the scale of the move probability m the integrand of scaled absorb is about the masked
    tokens' mean loss, and that of the mean parametrisation no larger, whatever the schedule, so
    there the density is that of a uniform m. Scores that the network gives itself also lose
    something wherever noise still grows, up to the largest sigma: half of their density is that of
    a uniform sigma.

    Args:
        bounded: whether the loss vanishes like 1 / (e^sigma - 1) or faster for large sigma.
    """
    ends = torch.tensor([t_min, 1.0], dtype=torch.float64)
    move_0, move_1 = schedule.move_probability(ends)
    sigma_0, sigma_1 = schedule.sigma(ends)
    share = 1.0 if bounded else 0.5

    def mixed(move: Tensor, sigma: Tensor) -> Tensor:
        return share * (move / (move_1 - move_0)) + (1.0 - share) * (sigma / (sigma_1 - sigma_0))

    def quantile(t: Tensor) -> Tensor:
        return mixed(schedule.move_probability(t) - move_0, schedule.sigma(t) - sigma_0)

    low, high = torch.full_like(u_K, t_min), torch.ones_like(u_K)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = quantile(middle) < u_K
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    t_K = (low + high) / 2
    slope_of_move = schedule.rate_over_expm1(t_K) * schedule.move_probability(t_K)
    return t_K, 1.0 / mixed(slope_of_move, schedule.rate(t_K))


def masks_by_their_number(
    move_L: npt.NDArray[np.float64], choice: float, sigma: float
) -> tuple[npt.NDArray[np.float64], float]:
    """Uniforms that mask a set S of tokens |S| times as often as their law, and the draw's weight.

    One token, the same for each, is masked for certain, and the others by their law: with m the
    chance of a mask and P(S) that of S, S comes with probability |S| / (L m) P(S). A loss that sums
    over masked tokens at a weight of about 1 / m becomes L times their mean.

    Args:
        move_L: independent uniforms in [0, 1); a token is masked where its entry is below
            1 - e^(-sigma).
        choice: one more of them: which token is masked for certain.

    Returns:
        The entries to corrupt with, and P(S) over how often S is drawn.
    """
    moves = move_L.copy()
    moves[int(choice * len(moves))] = 0.0
    move = -math.expm1(-sigma)
    return moves, len(moves) * move / int((moves < move).sum())


def moves_with_an_event(
    move_L: npt.NDArray[np.float64], choice: float, sigma: float
) -> tuple[npt.NDArray[np.float64], float]:
    """Uniforms that move at least one token more often than their law, and the draw's weight.

    The event, that the noise sigma touches at least one of L tokens, has probability
    P = 1 - e^(-sigma L). It is drawn with probability max(P, 1/2), and by its own law given that.

    Args:
        move_L: independent uniforms in [0, 1); a token moves where its entry is below
            1 - e^(-sigma).
        choice: one more of them: whether the event happens, and which token is touched first.

    Returns:
        The entries to corrupt with, and the probability of the drawn case over how often it is
        drawn.
    """
    length = len(move_L)
    event = -math.expm1(-sigma * length)
    often = max(event, 0.5)
    if choice >= often:
        return np.ones(length), (1.0 - event) / (1.0 - often)
    first = min(int(-math.log1p(-choice / often * event) / sigma), length - 1)
    moves = move_L.copy()
    moves[:first] = 1.0
    moves[first] = 0.0
    return moves, event / often
