"""What a run says on the console: plain lines in a file, a live display on a terminal."""

import math
import os
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

from sedd_scale.quantities import format_count, format_duration, with_error

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
# Losses that the display keeps for its little curve.
_HISTORY = 512
_UPDATES_PER_SECOND = 2
# Narrower terminals have the quantities below each other.
_TWO_COLUMNS = 76


class Console(Protocol):
    """Where one run is watched; only its main process has one."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Show an interval's numbers, as of metrics.jsonl."""

    def validation(self, step: int, nats_per_token: float, stderr: float) -> None:
        """Show a validation's bound and its standard error."""

    def saved(self, step: int) -> None:
        """Note that the checkpoint of `step` is complete."""

    def advance(self, step: int) -> None:
        """Note that `step` updates have been made."""

    def close(self) -> None:
        """Leave the console as it was found."""


def open_console(
    stream: TextIO, *, title: str, total_steps: int, first_step: int, peak: str, live: bool
) -> Console:
    """A live display where `live` is asked for and `stream` is a terminal, else plain lines.

    Args:
        title: names the run.
        peak: what the utilisation is a share of.
    """
    if live and is_watched(stream):
        return LiveConsole(
            stream, title=title, total_steps=total_steps, first_step=first_step, peak=peak
        )
    return LineConsole(stream, total_steps=total_steps, peak=peak)


def is_watched(stream: TextIO) -> bool:
    """Whether somebody watches: a terminal that can move its cursor, not a job of Slurm's."""
    dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    return stream.isatty() and not dumb and "SLURM_JOB_ID" not in os.environ


class LineConsole:
    """A line an interval, without control characters."""

    def __init__(self, stream: TextIO, *, total_steps: int, peak: str) -> None:
        self._stream, self._total_steps, self._peak = stream, total_steps, peak

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def training(self, step: int, values: Mapping[str, float]) -> None:
        self.say(format_training_line(step, self._total_steps, values, peak=self._peak))

    def validation(self, step: int, nats_per_token: float, stderr: float) -> None:
        self.say(format_validation_line(step, self._total_steps, nats_per_token, stderr))

    def saved(self, step: int) -> None:
        pass  # the writer of checkpoints says it with its size and time

    def advance(self, step: int) -> None:
        pass

    def close(self) -> None:
        self._stream.flush()


class LiveConsole:
    """A display that stays at the bottom of a terminal; lines that are said scroll above it."""

    def __init__(
        self, stream: TextIO, *, title: str, total_steps: int, first_step: int, peak: str
    ) -> None:
        from rich.console import Console as Terminal
        from rich.live import Live

        self._title, self._total_steps, self._peak = title, total_steps, peak
        self._step = first_step
        self._values: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._validation: tuple[int, float, float] | None = None
        # Its step, and when it was complete; None: before this start.
        self._saved: tuple[int, float | None] | None = (first_step, None) if first_step else None
        self._stepped_at = time.monotonic()
        self._terminal = Terminal(file=stream)
        self._live = Live(
            console=self._terminal,
            get_renderable=self.render,
            refresh_per_second=_UPDATES_PER_SECOND,
        )

    def say(self, line: str) -> None:
        self._terminal.print(line, markup=False, highlight=False, overflow="fold")

    def training(self, step: int, values: Mapping[str, float]) -> None:
        self._values = dict(values)
        if math.isfinite(values["loss"]):
            self._losses.append(values["loss"])

    def validation(self, step: int, nats_per_token: float, stderr: float) -> None:
        self._validation = (step, nats_per_token, stderr)
        self.say(format_validation_line(step, self._total_steps, nats_per_token, stderr))

    def saved(self, step: int) -> None:
        self._saved = (step, time.monotonic())

    def advance(self, step: int) -> None:
        # Not before the first step: until then a run may still be refused.
        self._live.start()
        self._step, self._stepped_at = step, time.monotonic()

    def close(self) -> None:
        self._live.stop()

    def render(self) -> "RenderableType":
        """The display as it is now, for the terminal's width."""
        from rich.console import Group
        from rich.text import Text

        width = self._terminal.width
        parts: list[RenderableType] = [Text("─" * width, style="dim"), self._head(width)]
        parts.append(self._numbers(width))
        if len(self._losses) > 1:
            room = width - 13
            curve = Text(" ")
            curve.append(f"{'loss curve':<12}", style="dim")
            curve.append(sparkline(list(self._losses), room), style="cyan")
            parts.append(curve)
        return Group(*parts)

    def _head(self, width: int) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = "?"
        if "step_ms" in self._values:
            seconds = (self._total_steps - self._step) * self._values["step_ms"] / 1000
            left = format_duration(seconds)
        counts = f"step {self._step:,} of {self._total_steps:,}"
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis", max_width=max(10, width // 4))
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        done = "done" if self._step >= self._total_steps else f"{left} left"
        head.add_row(
            Text(f" {self._title}", style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=self._step),
            Text(f"{counts}  {self._step / max(1, self._total_steps):4.0%}  {done}"),
        )
        return head

    def _numbers(self, width: int) -> "Table":
        """The quantities: name and value, in two columns where there is room."""
        from rich.table import Table

        left, right = self._run_rows(), self._machine_rows()
        grid = Table.grid(padding=(0, 1), expand=True)
        if width < _TWO_COLUMNS:
            grid.add_column(width=12, style="dim")
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            for name, value in left + right:
                grid.add_row(f" {name}", value)
            return grid
        for ratio, name_width in ((11, 12), (10, 11)):
            grid.add_column(width=name_width, style="dim", no_wrap=True)
            grid.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        for (name, value), (other, beside) in zip(left, right):
            grid.add_row(f" {name}", value, other, beside)
        return grid

    def _run_rows(self) -> "list[tuple[str, Text]]":
        from rich.text import Text

        values = self._values
        loss = _with_z(values, "loss", "loss_z", " nats/token")
        grad_norm = _with_z(values, "grad_norm", "grad_norm_z", "")
        rate = Text(f"{values['lr']:.2e}" if values else "–")
        validation = Text("–")
        if self._validation is not None:
            step, nats, stderr = self._validation
            validation = Text(with_error(nats, stderr, "±"), style="bold")
            validation.append(f" at step {step:,}", style="dim")
        return [("loss", loss), ("grad norm", grad_norm), ("lr", rate), ("validation", validation)]

    def _machine_rows(self) -> "list[tuple[str, Text]]":
        from rich.text import Text

        values, none = self._values, Text("–")
        speed = mfu = memory = none
        if values:
            speed = Text(f"{format_count(values['tokens_per_second'])}", style="bold")
            speed.append(f"  {format_step_time(values['step_ms'])} a step", style="dim")
            quiet = time.monotonic() - self._stepped_at
            if quiet > max(5.0, 3 * values["step_ms"] / 1000) and self._step < self._total_steps:
                speed.append(f"  last step {format_duration(quiet)} ago", style="yellow")
        if math.isfinite(values.get("mfu", math.nan)):
            mfu = Text(f"{values['mfu']:.1%}", style="bold")
            mfu.append(f" of {self._peak}", style="dim")
        if "memory_bytes" in values:
            memory = Text(f"{values['memory_bytes'] / 1e9:.2f} GB", style="bold")
            if "memory_total_bytes" in values:
                memory.append(f" of {values['memory_total_bytes'] / 1e9:.0f}", style="dim")
        saved = Text("none yet")
        if self._saved is not None:
            step, at = self._saved
            saved = Text(f"step {step:,}", style="bold")
            when = "gone on from" if at is None else f"{format_duration(time.monotonic() - at)} ago"
            saved.append(f", {when}", style="dim")
        return [("tokens/s", speed), ("MFU", mfu), ("memory", memory), ("checkpoint", saved)]


def _with_z(values: Mapping[str, float], name: str, z_name: str, unit: str) -> "Text":
    from rich.text import Text

    if name not in values:
        return Text("–")
    value = values[name]
    text = Text(f"{value:.3f}" if abs(value) < 1000 else f"{value:.3e}", style="bold")
    text.append(unit, style="dim")
    z = values.get(z_name, math.nan)
    if math.isfinite(z):
        text.append(f"  z {z:+.1f}", style="red" if z > 4 else "yellow" if z > 2 else "green")
    return text


def sparkline(values: list[float], width: int) -> str:
    """A row of bars, as many as fit: each the mean of its share of the values."""
    count = min(width, len(values))
    means = []
    for place in range(count):
        part = values[place * len(values) // count : (place + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def format_training_line(
    step: int, total_steps: int, values: Mapping[str, float], *, peak: str = "peak"
) -> str:
    """The line on one interval of training; `peak` is what the utilisation is a share of."""
    seconds_left = (total_steps - step) * values["step_ms"] / 1000.0
    loss_z, grad_norm_z = (_z_text(values, key) for key in ("loss_z", "grad_norm_z"))
    used = ""
    if math.isfinite(values.get("mfu", math.nan)):
        used += f"{values['mfu']:.1%} of {peak}  "
    if "memory_bytes" in values:
        used += f"{values['memory_bytes'] / 1e9:.2f} GB  "
    return (
        f"step {step}/{total_steps}  loss {values['loss']:.3f}{loss_z} nats/token  "
        f"|g| {values['grad_norm']:.2f}{grad_norm_z}  lr {values['lr']:.1e}  "
        f"{format_count(values['tokens_per_second'])} tokens/s  {used}"
        f"{values['step_ms']:.0f} ms/step  eta {format_duration(seconds_left)}"
    )


def _z_text(values: Mapping[str, float], key: str) -> str:
    z = values.get(key, math.nan)
    return f" (z {z:+.1f})" if math.isfinite(z) else ""


def format_validation_line(
    step: int, total_steps: int, nats_per_token: float, stderr: float
) -> str:
    """The line on one validation: the bound, its standard error and its perplexity."""
    perplexity = math.exp(min(nats_per_token, 700.0))
    digits = f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"
    return (
        f"step {step}/{total_steps}  validation bound "
        f"{with_error(nats_per_token, stderr, '+-')} nats/token "
        f"(averaged weights, perplexity {digits})"
    )


def format_step_time(milliseconds: float) -> str:
    """Such as 162 ms or 3.25 s."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"
