"""Which steps a guard lets through, as a function of their numbers alone."""

import json
import math

import pytest

from sedd_scale.config.sections import TrainingConfig
from sedd_scale.engine.update_gate import StepNumbers
from sedd_scale.training.guards import StepGuard, ZScore


def numbers(loss: float, grad_norm: float = 1.0) -> StepNumbers:
    return StepNumbers(loss, grad_norm, wants_stop=False)


def ordinary(step: int) -> StepNumbers:
    return numbers(4.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step))


def judged(guard: StepGuard, first: int, last: int) -> list[bool]:
    return [guard.accepts(step, ordinary(step)) for step in range(first, last + 1)]


def test_a_z_score_is_in_standard_deviations_of_the_window() -> None:
    window = ZScore(8, [1.0, 3.0] * 6)
    assert window.values() == [1.0, 3.0] * 4
    assert window.of(5.0) == pytest.approx(3.0)
    assert math.isnan(window.of(math.nan)) and math.isnan(ZScore(8, [1.0] * 7).of(1.0))


@pytest.mark.parametrize("bad", [numbers(math.nan), numbers(4.0, math.inf)])
def test_what_is_not_finite_is_left_out_and_stops_or_not_by_policy(bad: StepNumbers) -> None:
    for policy in ("stop", "skip"):
        guard = StepGuard(TrainingConfig(on_nonfinite=policy, stop_after_skips=2))
        assert all(judged(guard, 1, 20))
        assert not guard.accepts(21, bad)
        assert guard.verdict.cause == "nonfinite" and guard.skipped == 1
        assert (guard.must_stop() is not None) == (policy == "stop")
        guard.accepts(22, bad)
        assert guard.must_stop() is not None
        assert guard.accepts(23, ordinary(23)) and guard.must_stop() is None


def test_spikes_are_reported_and_left_out_only_when_asked() -> None:
    spike = numbers(9.0)
    reporting = StepGuard(TrainingConfig())
    judged(reporting, 1, 30)
    assert reporting.accepts(31, spike) and reporting.verdict.cause == "spike"
    skipping = StepGuard(TrainingConfig(skip_spikes_above=8.0))
    judged(skipping, 1, 30)
    before = skipping.state()["losses"]
    assert not skipping.accepts(31, spike) and skipping.verdict.loss_z > 8
    assert skipping.state()["losses"] == before
    assert skipping.accepts(32, numbers(0.0)), "a fall is no spike"


def test_listed_steps_are_left_out() -> None:
    guard = StepGuard(TrainingConfig(skip_steps=[3, [5, 7]], stop_after_skips=1))
    assert judged(guard, 1, 8) == [True, True, False, True, False, False, False, True]
    assert guard.skipped == 4 and guard.must_stop() is None


def test_a_guard_that_goes_on_decides_as_one_that_never_stopped() -> None:
    training = TrainingConfig(skip_spikes_above=3.0, on_nonfinite="skip")
    whole, first = StepGuard(training), StepGuard(training)
    for guard in (whole, first):
        judged(guard, 1, 40)
        guard.accepts(41, numbers(math.nan))
    second = StepGuard(training, json.loads(json.dumps(first.state())))
    for step in range(42, 60):
        loss = 4.0 + 0.1 * math.sin(step) + (step % 7 == 0) * 0.3
        assert whole.accepts(step, numbers(loss)) == second.accepts(step, numbers(loss))
        assert whole.verdict == second.verdict
    assert whole.state() == second.state()
