"""The learning rate's laws: warm-up, continuity, what is left at the end."""

import itertools
import math

import pytest

from sedd_scale.config import OptimizerConfig
from sedd_scale.training.learning_rate import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_wastes_no_update(schedule: str) -> None:
    config = OptimizerConfig(lr=2e-3, schedule=schedule, warmup_steps=8, decay_steps=10)
    rates = [learning_rate(step, config, 100) for step in range(100)]
    assert rates[:8] == pytest.approx([2e-3 * n / 8 for n in range(1, 9)])
    assert max(rates) == 2e-3
    assert min(rates) > 0


@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_without_warm_up_the_first_update_has_the_peak(schedule: str, warmup: int) -> None:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, decay_steps=3)
    assert learning_rate(0, config, 50) == pytest.approx(1.0, abs=2e-3)


def test_constant_never_ends() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=3)
    assert {learning_rate(step, config, 10) for step in range(2, 1000)} == {0.5}


def test_cosine_halves_in_the_middle_and_ends_at_the_floor() -> None:
    config = OptimizerConfig(lr=1.0, schedule="cosine", warmup_steps=20, min_lr_ratio=0.1)
    rates = [learning_rate(step, config, 120) for step in range(20, 121)]
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    for k, rate in enumerate(rates):  # symmetric about the middle
        assert rate + rates[100 - k] == pytest.approx(1.1)
        assert rate == pytest.approx(0.1 + 0.9 * math.cos(math.pi * k / 200) ** 2)
    assert learning_rate(500, config, 120) == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_in_equal_steps() -> None:
    config = OptimizerConfig(
        lr=1.0, schedule="wsd", warmup_steps=5, decay_steps=20, min_lr_ratio=0.2
    )
    rates = [learning_rate(step, config, 100) for step in range(5, 101)]
    assert set(rates[: 80 - 5 + 1]) == {1.0}
    fall = rates[80 - 5 :]
    for a, b in itertools.pairwise(fall):
        assert a - b == pytest.approx(0.8 / 20)
    assert fall[-1] == pytest.approx(0.2)


def test_a_longer_run_changes_only_what_depends_on_its_end() -> None:
    config = OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=5, decay_steps=20)
    short = [learning_rate(step, config, 100) for step in range(80)]
    assert short == [learning_rate(step, config, 1000) for step in range(80)]
