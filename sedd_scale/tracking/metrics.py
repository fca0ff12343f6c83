"""A run's numbers: metrics.jsonl always, the console, and trackers where they are asked for."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from sedd_scale.config import LoggingConfig
from sedd_scale.files.atomic import write_atomically
from sedd_scale.tracking.console import Console, open_console
from sedd_scale.tracking.trackers import TrackerProcess, finite_or_null, open_trackers
from sedd_scale.tracking.utilisation import Utilisation

# Of a validation: nats per token at times in [0, 0.1), [0.1, 0.2), ... [0.9, 1].
TIME_KEYS = tuple(f"valid_loss_t{tenth}" for tenth in range(10))

TRAINING_VALUES = {
    "loss": "nats a token",
    "grad_norm": "of the whole gradient, before clipping",
    "lr": "learning rate",
    "tokens": "of text seen since the run began; padding is not counted",
    "tokens_per_second": "of text",
    "step_ms": "milliseconds a step",
    "loss_z": "z-score of the loss among recent steps, nan while there are too few",
    "grad_norm_z": "the same of the gradient norm",
    "skipped_steps": "updates skipped since the run began",
}
"""What a line of metrics.jsonl holds of an interval of training."""

# For trackers of a run that ends with an error.
_FAILED_SECONDS = 10.0


class MetricsLog:
    """Writes a run's numbers where they are read; on every process but the main one it is silent.

    In a `with` the console and the trackers are left in order however the run ends.

    Args:
        run_dir: holds metrics.jsonl and what the trackers write.
        logging_config: the section `logging` of the configuration.
        is_main: whether this process writes.
        total_steps: steps of the whole run.
        resumed_step: step of the checkpoint that the run resumes from; later lines of metrics.jsonl
            are dropped, so that the file holds one history. None: a new run, an empty file.
        run_config: the resolved configuration, for trackers.
        utilisation: measures the main process. None: no `mfu` and `memory_bytes`.
        stream: the console.
    """

    def __init__(
        self,
        run_dir: str | Path,
        logging_config: LoggingConfig,
        *,
        is_main: bool,
        total_steps: int,
        resumed_step: int | None = None,
        run_config: Mapping[str, Any] | None = None,
        utilisation: Utilisation | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._is_main = is_main
        self._utilisation = utilisation
        self._console: Console | None = None
        self._trackers: list[TrackerProcess] = []
        if not is_main:
            return
        path = Path(run_dir) / "metrics.jsonl"
        drop_lines_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._console = open_console(
            stream or sys.stdout,
            title=Path(run_dir).resolve().name,
            total_steps=total_steps,
            first_step=resumed_step or 0,
            peak=utilisation.peak.name if utilisation is not None else "peak",
            live=logging_config.console == "auto",
        )
        self._trackers = open_trackers(
            Path(run_dir), logging_config, run_config or {}, resumed_step=resumed_step
        )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(None if error_type is None else _FAILED_SECONDS)

    def training(
        self, step: int, values: Mapping[str, float], *, data: Mapping[str, float] | None = None
    ) -> None:
        """Record one interval of training, after `step` updates.

        Args:
            values: `TRAINING_VALUES`, by name.
            data: epochs and the like, for the file alone.
        """
        if self._console is None:
            return
        values = dict(values)
        if self._utilisation is not None:
            values["mfu"] = self._utilisation.mfu(values["step_ms"] / 1000)
            values["memory_bytes"] = self._utilisation.memory_bytes()
        self._record(step, {**values, **(data or {})})
        if self._utilisation is not None and self._utilisation.memory_total_bytes is not None:
            values["memory_total_bytes"] = self._utilisation.memory_total_bytes
        self._console.training(step, values)

    def validation(
        self,
        step: int,
        *,
        nats_per_token: float,
        stderr: float,
        data: Mapping[str, float] | None = None,
    ) -> None:
        """Record the bound on the averaged weights and its standard error, both nats a token.

        Args:
            data: what else there is to say of the validation blocks, for the file alone.
        """
        if self._console is None:
            return
        values = {"valid_nats_per_token": nats_per_token, "valid_stderr": stderr}
        self._record(step, {**values, **(data or {})})
        self._console.validation(step, nats_per_token, stderr)

    def warn(self, step: int, line: str) -> None:
        """Record what somebody who reads the file later has to know, and say it."""
        if self._is_main:
            self._file.write(
                json.dumps({"step": step, "warning": line.removeprefix("warning: ")}) + "\n"
            )
            self._file.flush()
        self.say(line)

    def advance(self, step: int) -> None:
        """Note that `step` updates have been made."""
        if self._console is not None:
            self._console.advance(step)

    def saved(self, step: int) -> None:
        """Note that the checkpoint of `step` is complete."""
        if self._console is not None:
            self._console.saved(step)

    def say(self, line: str) -> None:
        """Print one line on the console of the main process."""
        if self._console is not None:
            self._console.say(line)

    def close(self, seconds: float | None = None) -> None:
        """Close the console, the file and the trackers; these get `seconds` for what is queued."""
        console, self._console = self._console, None
        if console is None:
            return
        console.close()
        self._file.close()
        for tracker in self._trackers:
            tracker.close(seconds)

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(metrics_line(step, values))
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, values)


def drop_lines_after(path: Path, resumed_step: int | None) -> None:
    """Drop the lines of metrics.jsonl after `resumed_step` (None: all), and any cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        step = _step_of(line)
        if step is not None and resumed_step is not None and step <= resumed_step:
            kept.append(f"{line}\n")
    write_atomically(path, "".join(kept).encode())


def metrics_line(step: int, values: Mapping[str, float]) -> str:
    """One line of metrics.jsonl; numbers that are not finite become null, which JSON can hold."""
    return json.dumps({"step": step, **finite_or_null(values)}, allow_nan=False) + "\n"


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
