"""A run's numbers: metrics.jsonl, console lines, a progress bar, Weights & Biases."""

import json
import math
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sedd_scale.config import LoggingConfig
from sedd_scale.data.atomic import write_atomically

# Seconds that the logging service may take to answer, at the start and at the end of a run.
_WANDB_SECONDS = 20.0


class MetricsLog:
    """Writes a run's numbers where they are read; on every process but the main one it is silent.

    Args:
        run_dir: holds metrics.jsonl and the wandb run's id.
        logging_config: the section `logging` of the configuration.
        is_main: whether this process writes.
        total_steps: steps of the whole run.
        resumed_step: step of the checkpoint that the run goes on from; later lines of metrics.jsonl
            are dropped, so that the file holds one history. None: a new run, an empty file.
        run_config: the resolved configuration, for wandb.
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
        stream: TextIO | None = None,
    ) -> None:
        self._is_main = is_main
        self._total_steps = total_steps
        self._stream = stream or sys.stdout
        self._progress: Any = None
        self._wandb: WandbRun | None = None
        if not is_main:
            return
        path = Path(run_dir) / "metrics.jsonl"
        keep_history(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        if self._stream.isatty():
            self._start_progress_bar(resumed_step or 0)
        if logging_config.wandb != "off":
            self._wandb = WandbRun(Path(run_dir), logging_config, run_config or {})

    def training(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        tokens_per_second: float,
        step_ms: float,
        loss_z: float = math.nan,
        grad_norm_z: float = math.nan,
        skipped_steps: int = 0,
        data: Mapping[str, float] | None = None,
    ) -> None:
        """Record one interval of training, after `step` updates.

        Args:
            loss: nats a token.
            grad_norm: before clipping.
            tokens: of text seen since the run began, padding left out.
            step_ms: milliseconds a step.
            loss_z: z-score of the loss among recent steps, nan while there are too few.
            grad_norm_z: the same of the gradient norm.
            skipped_steps: updates left out since the run began.
            data: epochs and the like, for the file alone.
        """
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens_per_second,
            "step_ms": step_ms,
            "loss_z": loss_z,
            "grad_norm_z": grad_norm_z,
            "skipped_steps": skipped_steps,
        }
        self._record(step, {**values, **(data or {})})
        self.say(format_training_line(step, self._total_steps, values))

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
        values = {"valid_nats_per_token": nats_per_token, "valid_stderr": stderr}
        self._record(step, {**values, **(data or {})})
        self.say(format_validation_line(step, self._total_steps, nats_per_token, stderr))

    def warn(self, step: int, line: str) -> None:
        """Record what somebody who reads the file later has to know, and say it."""
        if self._is_main:
            self._file.write(
                json.dumps({"step": step, "warning": line.removeprefix("warning: ")}) + "\n"
            )
            self._file.flush()
        self.say(line)

    def advance(self, step: int) -> None:
        """Move the progress bar, if there is one, to `step`."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def say(self, line: str) -> None:
        """Print one line on the console of the main process."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._is_main:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar, the file and the wandb run."""
        if not self._is_main:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        if not self._is_main:
            return
        self._file.write(metrics_line(step, values))
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(step, values)

    def _start_progress_bar(self, completed: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            "training",
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._progress.add_task("training", total=self._total_steps, completed=completed)
        self._progress.start()


class WandbRun:
    """A Weights & Biases run that may fail in any way without stopping the training.

    The first failure prints one warning and ends the logging there. The run's id is kept in the run
    directory, so that a resumed training goes on in the same wandb run.
    """

    def __init__(
        self, run_dir: Path, logging_config: LoggingConfig, run_config: Mapping[str, Any]
    ) -> None:
        self._run: Any = None
        try:
            self._run = self._start(run_dir, logging_config, run_config)
        except Exception as error:  # a foreign service: whatever it raises, training goes on
            self._give_up("start", error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one step's numbers."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # as above
            self._give_up("log", error)

    def finish(self) -> None:
        """End the run, waiting a bounded time for what is not yet sent."""
        run, self._run = self._run, None
        if run is None:
            return
        failures: list[Exception] = []

        def finish() -> None:
            try:
                run.finish()
            except Exception as error:  # as above
                failures.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(_WANDB_SECONDS)
        if thread.is_alive():
            failures.append(TimeoutError(f"no answer in {_WANDB_SECONDS:.0f} s"))
        for failure in failures:
            self._give_up("finish", failure)

    def _start(
        self, run_dir: Path, logging_config: LoggingConfig, run_config: Mapping[str, Any]
    ) -> Any:
        import wandb

        online = logging_config.wandb == "online"
        # `init` would ask for a missing key on the terminal, and wait.
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; run `wandb login` or set WANDB_API_KEY")
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            write_atomically(id_file, f"{secrets.token_hex(4)}\n".encode())
        return wandb.init(
            project=logging_config.wandb_project,
            name=logging_config.wandb_name or run_dir.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow" if online else None,
            dir=str(run_dir),
            config=dict(run_config),
            mode="online" if online else "offline",
            settings=wandb.Settings(
                init_timeout=_WANDB_SECONDS, silent=True, console="off", disable_git=True
            ),
        )

    def _give_up(self, what: str, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())
        print(
            f"warning: wandb could not {what} and is off from here on; "
            f"metrics.jsonl has everything ({type(error).__name__}: {reason})",
            file=sys.stderr,
            flush=True,
        )


def keep_history(path: Path, resumed_step: int | None) -> None:
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
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": step, **finite}, allow_nan=False) + "\n"


def format_training_line(step: int, total_steps: int, values: Mapping[str, float]) -> str:
    """The console's line on one interval of training."""
    seconds_left = (total_steps - step) * values["step_ms"] / 1000.0
    loss_z, grad_norm_z = (_z_text(values, key) for key in ("loss_z", "grad_norm_z"))
    return (
        f"step {step}/{total_steps}  loss {values['loss']:.3f}{loss_z} nats/token  "
        f"|g| {values['grad_norm']:.2f}{grad_norm_z}  lr {values['lr']:.1e}  "
        f"{format_count(values['tokens_per_second'])} tokens/s  "
        f"{values['step_ms']:.0f} ms/step  eta {format_duration(seconds_left)}"
    )


def _z_text(values: Mapping[str, float], key: str) -> str:
    z = values.get(key, math.nan)
    return f" (z {z:+.1f})" if math.isfinite(z) else ""


def format_validation_line(
    step: int, total_steps: int, nats_per_token: float, stderr: float
) -> str:
    """The console's line on one validation: the bound, its standard error and its perplexity."""
    perplexity = math.exp(min(nats_per_token, 700.0))
    return (
        f"step {step}/{total_steps}  validation bound {nats_per_token:.4f} +- {stderr:.4f} "
        f"nats/token (averaged weights, perplexity {perplexity:.2f})"
    )


def format_count(value: float) -> str:
    """Three digits and a suffix: 950, 12.3k, 4.56M."""
    for suffix in ("", "k", "M", "G"):
        digits = 0 if not suffix and value >= 100 else 2 if value < 10 else 1 if value < 100 else 0
        if round(value, digits) < 1000:
            return f"{value:.{digits}f}{suffix}"
        value /= 1000.0
    return f"{value:.1f}T"


def format_duration(seconds: float) -> str:
    """The two largest units: 41s, 3m12s, 2h05m, 1d07h."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def _step_of(line: str) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None
