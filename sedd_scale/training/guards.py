"""What a step's numbers say of it, and whether its update is made.

A guard's answers are a function of the numbers of this step and of earlier ones, which are equal on
all ranks, so the ranks agree without asking each other; its memory is part of a checkpoint, so that
a resumed run decides as the uninterrupted one does.
"""

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sedd_scale.config.sections import TrainingConfig
from sedd_scale.engine.engine import Engine, MicroBatch
from sedd_scale.engine.update_gate import StepNumbers, StepResult

# Values that a window needs before a new one is compared with them.
MIN_SCORED = 8
# A window's least standard deviation over its mean: constant numbers have no spikes in their noise.
MIN_SPREAD = 1e-6


class Verdict(NamedTuple):
    """What a guard found of one step."""

    applied: bool
    """Whether the update was made."""
    cause: str | None
    """Why not, or what is reported: "nonfinite", "spike", "listed"; None: an ordinary step."""
    loss_z: float
    """z-score of the loss among recent ones; nan while there are too few."""
    grad_norm_z: float
    """The same of the gradient norm."""


class ZScore:
    """How many standard deviations a value lies above the mean of recent ones."""

    def __init__(self, length: int, values: Sequence[float] = ()) -> None:
        self._values = deque(values, maxlen=length)

    def of(self, value: float) -> float:
        """The z-score of `value`, or nan if either it or the window says nothing."""
        if len(self._values) < MIN_SCORED or not math.isfinite(value):
            return math.nan
        mean = statistics.fmean(self._values)
        spread = max(statistics.pstdev(self._values, mean), MIN_SPREAD * abs(mean), 1e-30)
        return (value - mean) / spread

    def add(self, value: float) -> None:
        """Let later values be compared with this one too."""
        self._values.append(value)

    def values(self) -> list[float]:
        """The window, oldest first."""
        return list(self._values)


class StepGuard:
    """Judges every step of a run.

    Args:
        state: what `state` gave, of a run that resumes.

    Attributes:
        verdict: on the step judged last.
        skipped: updates skipped since the run began.
    """

    def __init__(self, training: TrainingConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._training = training
        self._losses = ZScore(training.spike_window, state.get("losses", ()))
        self._grad_norms = ZScore(training.spike_window, state.get("grad_norms", ()))
        self.skipped = int(state.get("skipped", 0))
        self._in_a_row = int(state.get("in_a_row", 0))
        self.verdict = Verdict(True, None, math.nan, math.nan)

    def train_step(
        self,
        engine: Engine,
        step: int,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Make step `step`, counted from 1, in an engine and judge it; once a step, in order.

        The engine skips what is not finite by itself; the update waits for this judgement only
        where the run may skip others.
        """
        training = self._training
        waits = training.skip_spikes_above is not None or is_listed(step, training.skip_steps)
        result = engine.train_step(
            micro_batches,
            lr=lr,
            accept=functools.partial(self.accepts, step) if waits else None,
            wants_stop=wants_stop,
        )
        if not waits:
            self.accepts(step, result.numbers)
        assert self.verdict.applied == result.applied
        return result

    def accepts(self, step: int, numbers: StepNumbers) -> bool:
        """Whether step `step`, counted from 1, is to change the weights; once a step, in order."""
        loss_z = self._losses.of(numbers.loss)
        grad_norm_z = self._grad_norms.of(numbers.grad_norm)
        highest = max((z for z in (loss_z, grad_norm_z) if not math.isnan(z)), default=0.0)
        skip_above = self._training.skip_spikes_above
        applied, cause = True, None
        if not numbers.finite:
            applied, cause = False, "nonfinite"
        elif is_listed(step, self._training.skip_steps):
            applied, cause = False, "listed"
        elif skip_above is not None and highest > skip_above:
            applied, cause = False, "spike"
        elif highest > self._training.report_spikes_above:
            cause = "spike"
        if applied:
            self._losses.add(numbers.loss)
            self._grad_norms.add(numbers.grad_norm)
        self.skipped += not applied
        if cause != "listed":
            self._in_a_row = 0 if applied else self._in_a_row + 1
        self.verdict = Verdict(applied, cause, loss_z, grad_norm_z)
        return applied

    def must_stop(self) -> str | None:
        """Why the run cannot go on after the step judged last, or None if it can."""
        training = self._training
        if self.verdict.cause == "nonfinite" and training.on_nonfinite == "stop":
            return "training.on_nonfinite=stop"
        if self._in_a_row >= training.stop_after_skips:
            return f"{self._in_a_row} updates in a row were left out (training.stop_after_skips)"
        return None

    def explain(self) -> str:
        """Of the step judged last, one with finite numbers: how far from recent ones they are."""
        verdict, window = self.verdict, len(self._losses.values())
        return (
            f"its numbers are finite, and their z-scores among the last {window} steps that were "
            f"applied are {verdict.loss_z:.1f} (loss) and {verdict.grad_norm_z:.1f} (gradient norm)"
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, of JSON types."""
        return {
            "losses": self._losses.values(),
            "grad_norms": self._grad_norms.values(),
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
        }


def is_listed(step: int, skip_steps: Sequence[Any] | None) -> bool:
    """Whether training.skip_steps, numbers and [first, last] ranges, holds the step."""
    for item in skip_steps or ():
        first, last = item if isinstance(item, list) else (item, item)
        if first <= step <= last:
            return True
    return False
