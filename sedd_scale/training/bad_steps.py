"""bad_steps.jsonl: every step that a guard skipped, reported or stopped at, and its batch.

A line holds what identifies the batch without the layout that made it: its samples in the run's
order, the fingerprint of the data, and a fingerprint of the noisy batch itself.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sedd_scale.config import Config
from sedd_scale.engine.engine import Engine, MicroBatch
from sedd_scale.engine.update_gate import StepNumbers
from sedd_scale.errors import TrainingError
from sedd_scale.parallel.agreement import gathered
from sedd_scale.parallel.layout import Layout
from sedd_scale.tracking.metrics import drop_lines_after
from sedd_scale.training.guards import StepGuard, Verdict

FILE_NAME = "bad_steps.jsonl"


class BadSteps:
    """The run's record of bad steps; its lines after `resumed_step` are dropped, as metrics' are.

    Args:
        fingerprint: of the dataset, or of those of the mixture.
    """

    def __init__(
        self, run_dir: Path, config: Config, layout: Layout, *, fingerprint: str, resumed_step: int
    ) -> None:
        self._path = run_dir / FILE_NAME
        self._config, self._layout, self._fingerprint = config, layout, fingerprint
        if layout.rank == 0:
            drop_lines_after(self._path, resumed_step)

    def record(
        self,
        step: int,
        numbers: StepNumbers,
        verdict: Verdict,
        micro_batches: Sequence[MicroBatch],
        *,
        action: str,
    ) -> str:
        """Write one line; collective over all processes. The console's words on it are returned.

        Args:
            micro_batches: of this rank.
            action: "stopped", "skipped" or "reported".
        """
        batch = self._config.training.global_batch
        values: dict[str, Any] = {
            "step": step,
            "action": action,
            "cause": verdict.cause,
            "loss": _finite(numbers.loss),
            "grad_norm": _finite(numbers.grad_norm),
            "loss_z": _finite(verdict.loss_z),
            "grad_norm_z": _finite(verdict.grad_norm_z),
            "first_sample": (step - 1) * batch,
            "last_sample": step * batch - 1,
            "dataset_fingerprint": self._fingerprint,
            "batch_fingerprint": batch_fingerprint(micro_batches, self._layout),
        }
        if self._layout.rank == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, allow_nan=False) + "\n")
        return (
            f"step {step} {action} ({verdict.cause}): loss {numbers.loss:.4g} "
            f"(z {verdict.loss_z:.1f}), |g| {numbers.grad_norm:.4g} (z {verdict.grad_norm_z:.1f}), "
            f"samples {values['first_sample']}-{values['last_sample']}, "
            f"batch {values['batch_fingerprint']}"
        )


def stopped_at(
    step: int,
    numbers: StepNumbers,
    by: str,
    guard: StepGuard,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
) -> TrainingError:
    """The error of a run that ends at a bad step; collective over all processes.

    Args:
        by: what stops it, as `StepGuard.must_stop` says.
    """
    finite = guard.verdict.cause != "nonfinite"
    why = guard.explain() if finite else engine.explain(micro_batches)
    knob = "training.skip_spikes_above" if finite else "training.on_nonfinite=skip"
    return TrainingError(
        f"step {step} has loss {numbers.loss} and gradient norm {numbers.grad_norm}: "
        f"{why}; stopped by {by}: look at its batch with --replay {step}, and "
        "resume from the last checkpoint with a lower optimizer.lr or optimizer.clip, "
        f"with training.skip_steps, or with {knob}"
    )


def batch_fingerprint(micro_batches: Sequence[MicroBatch], layout: Layout) -> str:
    """16 hexadecimal digits of the global batch: the sum of its noisy samples' hashes.

    Of tokens and times as the network sees them; the same under any split. Collective over the
    data-parallel ranks.
    """
    total = 0
    for micro_batch in micro_batches:
        noisy_BL, sigma_B, _ = micro_batch.inputs
        for noisy_L, sigma in zip(noisy_BL, sigma_B, strict=True):
            digest = hashlib.sha256(noisy_L.long().numpy().tobytes() + sigma.numpy().tobytes())
            total += int.from_bytes(digest.digest()[:8], "little")
    return f"{sum(gathered(total, layout.data_group)) % 2**64:016x}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
