"""How far a generation is: one line that is drawn anew on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, TextIO

from sedd_scale.quantities import format_duration

TERMINAL_SECONDS = 0.5
PLAIN_SECONDS = 30.0


class Done(NamedTuple):
    """What all ranks together have done in this session."""

    samples: int
    tokens: int
    work: int
    """In the unit of the whole's `total_work`."""


class ProgressLine:
    """Shows, until it is closed, what `done` says; on a thread of its own.

    Args:
        done: asked at every interval.
        total_samples: of the whole run.
        samples_before: already there when this session began.
        total_work: of this session, proportional to time.
        stream: where it goes.
        seconds: between lines; by the kind of stream when None.
    """

    def __init__(
        self,
        done: Callable[[], Done],
        *,
        total_samples: int,
        samples_before: int,
        total_work: int,
        stream: TextIO,
        seconds: float | None = None,
    ) -> None:
        self._done, self._stream = done, stream
        self._total, self._before, self._total_work = total_samples, samples_before, total_work
        self._in_place = stream.isatty()
        self._seconds = seconds or (TERMINAL_SECONDS if self._in_place else PLAIN_SECONDS)
        self._start = time.monotonic()
        self._width = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ProgressLine":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._in_place:
            if kind is None:
                self._show()
            self._stream.write("\n")
            self._stream.flush()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._show()

    def _show(self) -> None:
        line = progress_line(
            self._done(),
            total_samples=self._total,
            samples_before=self._before,
            total_work=self._total_work,
            seconds=time.monotonic() - self._start,
        )
        if self._in_place:
            padding = " " * (self._width - len(line))
            self._width = len(line)
            self._stream.write(f"\r{line}{padding}")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def progress_line(
    done: Done, *, total_samples: int, samples_before: int, total_work: int, seconds: float
) -> str:
    """Samples of all, tokens per second, and the time left at the pace of this session."""
    there = samples_before + done.samples
    parts = [f"{there:,} of {total_samples:,} samples"]
    if done.work and seconds > 0:
        parts.append(f"{done.tokens / seconds:,.0f} tokens/s")
        left = seconds * (total_work - done.work) / done.work
        finished = done.work >= total_work
        parts.append(format_duration(seconds) if finished else f"{format_duration(left)} left")
    return ", ".join(parts)
