"""The console: what a terminal shows, column by column, and what a file or a job's log gets."""

import contextlib
import fcntl
import io
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest

from sedd_scale.quantities import format_count, format_duration
from sedd_scale.tracking.console import (
    LineConsole,
    format_step_time,
    format_training_line,
    is_watched,
    sparkline,
)
from tests.repository import ROOT

PROGRAM = [sys.executable, str(Path(__file__).with_name("watched_run.py")), "runs/books"]
LINES = 24


class Terminal:
    """A real pseudo-terminal, and a screen that draws what is written to it."""

    def __init__(self, columns: int, **environment: str) -> None:
        self.screen = pyte.Screen(columns, LINES)
        self._stream = pyte.ByteStream(self.screen)
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            # A dictionary of its own: readline, if it is loaded, sets COLUMNS behind os.environ.
            unset = ("SLURM_JOB_ID", "COLUMNS", "LINES")
            inherited = {name: value for name, value in os.environ.items() if name not in unset}
            added = {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
            os.execve(PROGRAM[0], PROGRAM, {**inherited, **added})
        self.resize(columns)
        mode = termios.tcgetattr(self._terminal)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(self._terminal, termios.TCSANOW, mode)
        self.raw = b""

    def resize(self, columns: int) -> None:
        self.screen.resize(LINES, columns)
        size = struct.pack("HHHH", LINES, columns, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, seen: Callable[[str], bool]) -> list[str]:
        """The screen's lines, once they are as wanted."""
        deadline, quiet = time.monotonic() + 30, False
        # Between two drawings: a display is not read while it is being drawn.
        while not (quiet and seen("\n".join(self.screen.display))):
            assert time.monotonic() < deadline, "\n".join(self.screen.display)
            quiet = not select.select([self._terminal], [], [], 0.1)[0]
            if not quiet:
                try:
                    part = os.read(self._terminal, 65536)
                except OSError:  # the program has ended
                    quiet, part = True, b""
                self.raw += part
                self._stream.feed(part)
        return [line.rstrip() for line in self.screen.display]

    def close(self) -> None:
        os.close(self._terminal)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, 9)
        os.waitpid(self._process, 0)


def cells(lines: list[str], name: str) -> str:
    """The line that holds a quantity."""
    (line,) = [line for line in lines if f" {name}  " in f" {line}  "]
    return line


def test_a_terminal_shows_everything_at_80_and_at_120_columns():
    terminal = Terminal(80)
    try:
        terminal.type("go\nvalidate\n")
        lines = terminal.wait_for(lambda text: "step 20 of 1,000" in text and "at step 20 " in text)
        assert terminal.screen.cursor.hidden
        assert max(map(len, lines)) <= 80
        (head,) = [line for line in lines if line.startswith(" books ")]
        assert head.endswith("step 20 of 1,000    2%  2m39s left") and "━" in head
        assert "loss        7.500 nats/token  z +4.6" in cells(lines, "loss")
        assert "grad norm   0.930  z +2.5" in cells(lines, "grad norm")
        assert "3.00e-04" in cells(lines, "lr")
        assert "12.3k  162 ms a step" in cells(lines, "tokens/s")
        assert "38.5% of measured peak" in cells(lines, "MFU")
        assert "1.25 GB" in cells(lines, "memory")
        assert "none yet" in cells(lines, "checkpoint")
        assert "4.6522 ± 0.0137 at step 20" in cells(lines, "validation")
        assert cells(lines, "curve").endswith("█▁")
        # What was said stays above the display, whole words to a line.
        assert lines[0] == "begun" and lines[1].startswith("step 20/1000  validation bound 4.6522")
        assert lines[1].endswith("weights,") and lines[2].startswith("perplexity")

        terminal.resize(120)
        terminal.type("save\n")
        lines = terminal.wait_for(lambda text: "─" * 120 in text and "\na warning of" in text)
        assert re.search(r"checkpoint  step 30, \ds ago", cells(lines, "checkpoint"))
        # The display's last drawing holds each quantity once.
        assert sum("tokens/s" in line for line in lines) == 1
        assert any(line == "a warning of somebody" for line in lines)

        terminal.type("\x04")
        lines = terminal.wait_for(lambda text: "left" in text.splitlines()[-1] or "\nleft " in text)
        assert not terminal.screen.cursor.hidden
        assert b"\x1b[" in terminal.raw
    finally:
        terminal.close()


def test_a_narrow_terminal_has_one_column():
    terminal = Terminal(50)
    try:
        terminal.type("go\n")
        lines = terminal.wait_for(lambda text: "checkpoint" in text and "7.750" in text)
        assert max(map(len, lines)) <= 50
        assert "tokens/s" not in cells(lines, "loss") and "12.3k" in cells(lines, "tokens/s")
    finally:
        terminal.close()


def test_a_pipe_gets_one_plain_line_an_interval():
    done = subprocess.run(
        PROGRAM,
        input="go\nvalidate\nsave\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")
    assert [line.split("  ")[0] for line in lines] == [
        "begun", "step 10/1000", "step 20/1000", "step 20/1000", "step 30/1000", "left", "",
    ]  # fmt: skip
    assert all(character.isprintable() for line in lines for character in line)
    assert lines[1] == (
        "step 10/1000  loss 7.750 (z -0.5) nats/token  |g| 0.93 (z +2.5)  lr 3.0e-04  "
        "12.3k tokens/s  38.5% of measured peak  1.25 GB  162 ms/step  eta 2m40s"
    )


def test_who_watches(monkeypatch: pytest.MonkeyPatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_watched(Screen()) and not is_watched(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_watched(Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not is_watched(Screen())


def test_numbers_that_are_not_there_are_left_out():
    stream = io.StringIO()
    console = LineConsole(stream, total_steps=1307, peak="bf16 peak")
    values = {"loss": 4.8123, "grad_norm": 0.93, "lr": 1e-3, "tokens_per_second": 12_345.0}
    console.training(120, {**values, "step_ms": 162.0, "mfu": math.nan})
    console.advance(121)
    console.saved(121)
    console.close()
    assert stream.getvalue() == (
        "step 120/1307  loss 4.812 nats/token  |g| 0.93  lr 1.0e-03  12.3k tokens/s  "
        "162 ms/step  eta 3m12s\n"
    )
    nan = format_training_line(120, 1307, {**values, "loss": math.nan, "step_ms": 162.0})
    assert "loss nan nats/token" in nan


def test_a_little_curve():
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0, 2.0, 2.0], 2) == "▁█"
    assert sparkline([3.0] * 100, 10) == "▁" * 10


def test_counts_and_durations():
    counts = [0, 7.25, 42, 999, 1000, 12_345, 999_600, 4.56e6, 3e9, 5e12]
    assert [format_count(value) for value in counts] == [
        "0.00", "7.25", "42.0", "999", "1.00k", "12.3k", "1.00M", "4.56M", "3.00G", "5.0T",
    ]  # fmt: skip
    durations = [0, 41.4, 60, 192, 7500, 111_600, -3, float("inf")]
    assert [format_duration(value) for value in durations] == [
        "0s", "41s", "1m00s", "3m12s", "2h05m", "1d07h", "0s", "?",
    ]  # fmt: skip
    assert [format_step_time(value) for value in (4.2, 999, 3250)] == ["4 ms", "999 ms", "3.25 s"]
