"""Weighted times and corruptions have the expectations of the laws they stand for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sedd_scale.diffusion.schedules import make_schedule
from sedd_scale.evaluation.draw_plan import make_plan
from sedd_scale.evaluation.importance import (
    masks_by_their_number,
    moves_with_an_event,
    uniform_times,
    weighted_times,
)

Draw = Callable[[np.ndarray, float, float], tuple[np.ndarray, float]]
SCHEDULES = ("loglinear", "geometric", "cosine", "linear")


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("bounded", [True, False])
def test_mean_of_weighted_integrand_is_the_integral(name: str, bounded: bool) -> None:
    schedule = make_schedule(name, sigma_max=6.0)
    u_K = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t_K, weight_K = weighted_times(u_K, schedule, t_min=0.05, bounded=bounded)
    assert t_K.min() >= 0.05 and t_K.max() <= 1.0 and (t_K.diff() >= 0).all()
    for power in (0, 1, 3):
        exact = (1.0 - 0.05 ** (power + 1)) / (power + 1)
        assert (weight_K * t_K**power).mean().item() == pytest.approx(exact, rel=1e-4)


def test_scaled_absorb_under_loglinear_has_uniform_times() -> None:
    u_K = torch.from_numpy(np.linspace(0.0, 1.0, 9)[:-1])
    t_K, weight_K = weighted_times(u_K, make_schedule("loglinear"), t_min=1e-3, bounded=True)
    torch.testing.assert_close(t_K, uniform_times(u_K, t_min=1e-3)[0])
    torch.testing.assert_close(weight_K, torch.full_like(u_K, 1 - 1e-3))


def test_the_integrand_of_scaled_absorb_is_flat_on_its_scale() -> None:
    schedule = make_schedule("geometric", sigma_max=20.0)
    u_K = torch.from_numpy(np.linspace(0.0, 1.0, 101)[:-1])
    t_K, weight_K = weighted_times(u_K, schedule, t_min=1e-3, bounded=True)
    # Expected masked tokens times the loss's weight, for a token loss of 1 nat.
    masked = schedule.move_probability(t_K) * schedule.rate_over_expm1(t_K)
    torch.testing.assert_close(weight_K * masked, torch.full_like(u_K, (weight_K * masked)[0]))


@pytest.mark.parametrize("draw", [masks_by_their_number, moves_with_an_event])
@pytest.mark.parametrize("sigma", [1e-3, 0.1, 3.0])
def test_weighted_moves_have_the_law_of_the_noise(sigma: float, draw: Draw) -> None:
    generator = np.random.default_rng(0)
    length, count = 4, 40_000
    always = draw is masks_by_their_number
    move = -np.expm1(-sigma)
    weight_of_pattern = np.zeros(2**length)
    for move_L, choice in zip(generator.random((count, length)), generator.random(count)):
        moves, weight = draw(move_L, choice, sigma)
        pattern = int((moves < move) @ (1 << np.arange(length)))
        assert pattern or not always
        weight_of_pattern[pattern] += weight / count
    for pattern in range(always, 2**length):
        moved = pattern.bit_count()
        exact = move**moved * (1 - move) ** (length - moved)
        event = -np.expm1(-sigma * length)
        # Five standard deviations of a mean of weights of which none is above this.
        largest = length * move if always else max(event, exact)
        spread = 5 * np.sqrt(exact * largest / count * 2)
        assert weight_of_pattern[pattern] == pytest.approx(exact, abs=spread), pattern


def test_masks_of_early_and_late_strata_are_the_turned_round_ones_of_a_replicate() -> None:
    """And no two replicates share any."""
    plan = make_plan(
        1, draws=6, replicates=2, seed=0, batch_size=1, protocol="low-variance", t_min=1e-3
    )
    rows = [plan.moves("noise", 50, 0, draw) for draw in range(6)]
    for first, last in ((0, 2), (3, 5)):
        np.testing.assert_allclose(rows[first] + rows[last], 1.0)
    for one, other in ((0, 1), (0, 3), (0, 5), (1, 4), (2, 3)):
        assert abs(np.corrcoef(rows[one], rows[other])[0, 1]) < 0.5
        assert not np.isin(rows[one], rows[other]).any()
    decode = [plan.moves("decode", 50, 0, draw) for draw in range(2)]
    assert not np.isin(decode[0], decode[1]).any() and not np.isin(decode[0], rows[0]).any()
