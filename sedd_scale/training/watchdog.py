"""Ends a rank that makes no progress, after writing down where every thread of it stands.

A rank that is stopped, dead or stuck leaves the others waiting in a collective, each in its own
process and none of them with an error. Every rank therefore has its own watchdog: the loop tells it
when a step is done, and a thread compares the time since then with what steps have taken so far.
All ranks measure about the same times, so all of them write their stacks before the first ends.
"""

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from sedd_scale.config.sections import TrainingConfig
from sedd_scale.training.signals import EXIT_LOST_RANK

# Recent steps whose median is compared with; fewer than MEASURED count as no measurement yet.
RECENT, MEASURED = 50, 3
# Seconds that a dump into a file may take: the file system may be what hangs.
DUMP_SECONDS = 10.0


class Watchdog:
    """Watches over the time since the last step; use it in a `with`, around the whole loop.

    The limit of a step is the greater of training.hang_floor and training.hang_factor times the
    median of recent steps; of the first steps, and within `slow`, the greater of training.hang_slow
    and training.hang_factor times the longest so far. Time in which this process was itself stopped
    (a suspended job) does not count.

    Args:
        run_dir: gets stacks-rank-N.txt of a hang.
        end: ends the process; called in the watchdog's thread.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        training: TrainingConfig,
        *,
        first_step: int = 0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._path = run_dir / f"stacks-rank-{rank}.txt"
        self._rank, self._end = rank, end
        self._factor, self._floor = training.hang_factor, training.hang_floor
        self._slow_limit = training.hang_slow
        self._step_seconds: deque[float] = deque(maxlen=RECENT)
        self._longest: dict[str, float] = {}
        self._step = first_step
        self._phase: str | None = None
        self._since = time.monotonic()
        self._paused = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def step_done(self, step: int) -> None:
        """Step `step` is done, and the next one begins."""
        now = time.monotonic()
        self._step_seconds.append(now - self._since - self._paused)
        self._step, self._since, self._paused = step, now, 0.0

    @contextlib.contextmanager
    def slow(self, phase: str) -> Iterator[None]:
        """Between two steps, something that takes longer: "a validation", "a save"."""
        self._since, self._paused, self._phase = time.monotonic(), 0.0, phase
        yield  # an error leaves the phase as it is, to be named
        now = time.monotonic()
        self._longest[phase] = max(self._longest.get(phase, 0.0), now - self._since)
        self._since, self._paused, self._phase = now, 0.0, None

    def limit(self) -> float:
        """Seconds that what the rank is at now may take."""
        phase = self._phase
        if phase is not None:
            return max(self._slow_limit, self._factor * self._longest.get(phase, 0.0))
        measured = list(self._step_seconds)
        if len(measured) < MEASURED:
            return self._slow_limit
        return max(self._floor, self._factor * statistics.median(measured))

    def where(self) -> str:
        """What this rank is at, as "in the step after step 7"."""
        return f"in {self._phase or 'the step'} after step {self._step}"

    def __enter__(self) -> "Watchdog":
        if self._factor:
            self._since = time.monotonic()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        poll = min(1.0, self._floor / 10)
        looked = time.monotonic()
        while not self._closed.wait(poll):
            now = time.monotonic()
            if now - looked > 5 * poll + 1.0:  # this process, or its machine, stood still itself
                self._paused += now - looked
            looked = now
            limit, elapsed = self.limit(), now - self._since - self._paused
            if elapsed > limit:
                self._give_up(elapsed, limit)
                return

    def _give_up(self, elapsed: float, limit: float) -> None:
        line = (
            f"rank {self._rank}: no progress for {elapsed:.0f} s {self.where()} "
            f"(limit {limit:.0f} s): a rank hangs or was lost; stacks follow and are in "
            f"{self._path}; ending with exit code {EXIT_LOST_RANK}\n"
        )
        write_stacks(sys.stderr, line)
        helper = threading.Thread(target=self._dump_to_file, args=(line,), daemon=True)
        helper.start()
        helper.join(DUMP_SECONDS)
        # The others are at most a little behind: their own stacks are wanted before this rank's end
        # reaches them as a broken connection.
        time.sleep(2.0 + 0.05 * limit)
        self._end(EXIT_LOST_RANK)

    def _dump_to_file(self, line: str) -> None:
        with contextlib.suppress(OSError), self._path.open("w") as file:
            write_stacks(file, line)


def write_stacks(file: TextIO, line: str) -> None:
    """One line, then the Python stack of every thread of this process."""
    try:
        file.write(line)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    except (OSError, ValueError):  # a closed console must not keep the process alive
        return
