"""Trackers such as Weights & Biases, kept where they can neither stop nor slow the training.

Each has a process of its own, fed by a thread through a queue of bounded length. Taking a record
is putting it into the queue; where that is full, because the service does not answer, the record is
dropped, counted and said. A tracker that fails is off from there on. At the end of a run it has a
bounded time to send what is left; then its process is ended.
"""

import contextlib
import json
import math
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sedd_scale.config import LoggingConfig
from sedd_scale.files.atomic import write_atomically
from sedd_scale.files.package import environment_for

QUEUED_RECORDS = 1000
"""Records that wait for a tracker at most."""
CLOSING_SECONDS = 30.0
"""For what is not yet sent at the end of a run."""

WANDB = "sedd_scale.tracking.wandb_tracker:WandbTracker"
TENSORBOARD = "sedd_scale.tracking.tensorboard_tracker:TensorBoardTracker"

_EVERYTHING_ELSE = "metrics.jsonl has everything"


def open_trackers(
    run_dir: Path,
    logging_config: LoggingConfig,
    run_config: Mapping[str, Any],
    *,
    resumed_step: int | None,
) -> "list[TrackerProcess]":
    """Start what the section `logging` asks for.

    The id of a Weights & Biases run is kept in the run directory, so that a run that was begun
    before goes on under it. Offline every start is a run of its own, of a group with that id:
    `wandb sync` of a second folder with the same id would take the place of the first.
    """
    trackers = []
    if logging_config.wandb != "off":
        run_id, is_offline = wandb_id(run_dir), logging_config.wandb == "offline"
        started = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        arguments: dict[str, Any] = {
            "run_dir": str(run_dir.resolve()),
            "mode": logging_config.wandb,
            "project": logging_config.wandb_project,
            "name": logging_config.wandb_name or run_dir.resolve().name,
            "run_id": f"{run_id}-{started}" if is_offline else run_id,
            "group": run_id if is_offline else None,
            "config": dict(run_config),
            "watched_pid": os.getpid(),
        }
        trackers.append(TrackerProcess("wandb", WANDB, arguments))
    if logging_config.tensorboard:
        arguments = {
            "folder": str(run_dir.resolve() / "tensorboard"),
            "resumed_step": resumed_step,
            "config": json.dumps(run_config, indent=1),
        }
        trackers.append(TrackerProcess("TensorBoard", TENSORBOARD, arguments))
    return trackers


def wandb_id(run_dir: Path) -> str:
    """The run's id at Weights & Biases; made where there is none, or no whole one."""
    file = run_dir / "wandb_id.txt"
    known = file.read_text(errors="replace").strip() if file.is_file() else ""
    if re.fullmatch(r"[\w-]{1,100}", known):
        return known
    made = secrets.token_hex(4)
    write_atomically(file, f"{made}\n".encode())
    return made


def finite_or_null(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers that JSON can hold: those that are not finite become null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def warn_on_stderr(line: str) -> None:
    """Say a warning where it is seen, whatever becomes of the numbers."""
    print(line, file=sys.stderr, flush=True)


class TrackerProcess:
    """One tracker in a process of its own.

    Args:
        name: what it is called in warnings.
        factory: `module:class` of a `tracker_process.Tracker`.
        arguments: of the class, as JSON values.
        warn: told in one line, from any thread, what does not work.

    Attributes:
        dropped: records that found the queue full.
    """

    def __init__(
        self,
        name: str,
        factory: str,
        arguments: Mapping[str, Any],
        *,
        warn: Callable[[str], None] = warn_on_stderr,
        queued: int = QUEUED_RECORDS,
    ) -> None:
        self.name, self.dropped = name, 0
        self._warn = warn
        # Off: it takes nothing more. Ending: it is being ended from here.
        self._off, self._ending = threading.Event(), threading.Event()
        self._queue: queue.Queue[str | None] = queue.Queue(queued)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sedd_scale.tracking.tracker_process", factory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of a terminal's Ctrl-C
            env=environment_for(os.environ),
        )
        self._queue.put_nowait(json.dumps(arguments) + "\n")
        self._answers = threading.Thread(target=self._listen, daemon=True)
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._answers.start()
        self._feeder.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over one step's numbers, without waiting."""
        self._put({"step": step, "values": finite_or_null(values)})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Hand over samples of the model as it was after `step` updates, without waiting."""
        self._put({"step": step, "samples": [dict(sample) for sample in samples]})

    def close(self, seconds: float | None = None) -> None:
        """Wait for what is not yet sent, so long at most (CLOSING_SECONDS), and end the process."""
        seconds = CLOSING_SECONDS if seconds is None else seconds
        deadline = time.monotonic() + seconds
        ended = False
        while not ended and not self._off.is_set() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.1, deadline - time.monotonic()))
            ended = True
        unsent = self._queue.qsize()
        self._end()
        self._feeder.join(1.0)
        self._answers.join(1.0)
        if not ended:
            left = f", with {unsent} records not taken" if unsent else ""
            self._warn(
                f"warning: {self.name} did not end within {seconds:.0f} s and is left"
                f"{left}; {_EVERYTHING_ELSE}"
            )
        if self.dropped:
            self._warn(
                f"warning: {self.name} lacks {self.dropped} records that it was too slow for; "
                f"{_EVERYTHING_ELSE}"
            )

    def _put(self, record: Mapping[str, Any]) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(json.dumps(record) + "\n")
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                self._warn(
                    f"warning: {self.name} does not keep up, and {self._queue.maxsize} records "
                    f"wait for it: further ones are dropped; {_EVERYTHING_ELSE}"
                )

    def _feed(self) -> None:
        """The feeder's thread: from the queue into the process, which may block."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            while (line := self._queue.get()) is not None:
                stdin.write(line.encode())
                stdin.flush()
            stdin.close()
        except (OSError, ValueError):  # it has ended, and the listener says why
            self._off.set()

    def _listen(self) -> None:
        """The listener's thread: until the process closes its answers, by ending."""
        answers = self._process.stdout
        assert answers is not None
        with answers:
            line = answers.readline()
        if line:
            failure = json.loads(line)
            self._off.set()
            self._warn(
                f"warning: {self.name} could not {failure['what']} and is off from here on; "
                f"{_EVERYTHING_ELSE} ({failure['error']})"
            )
            return
        code = self._process.wait()
        if code and not self._ending.is_set():
            self._off.set()
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            self._warn(
                f"warning: {self.name} ended with {how} and is off from here on; {_EVERYTHING_ELSE}"
            )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._ending.set()
            self._off.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
