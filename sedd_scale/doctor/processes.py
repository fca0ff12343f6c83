"""Starts the doctor's trials, each in processes of its own, and collects what they say."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO

from sedd_scale.files.package import environment_for

LIMIT_SECONDS = 240.0
# Of a launcher that the doctor itself may run under.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def trial_environment() -> dict[str, str]:
    """This process's, without a launcher's."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    return environment_for(environment)


def run_trial(*words: str, seconds: float = LIMIT_SECONDS) -> tuple[list[str], str | None]:
    """Run one process; the JSON lines that it printed, and why it ended early, if it did."""
    ((output, error),) = run_trials([list(words)], seconds=seconds)
    return output, error


def run_trials(
    trials: list[list[str]], *, seconds: float = LIMIT_SECONDS
) -> list[tuple[list[str], str | None]]:
    """Run processes side by side, of each what `run_trial` gives; all have ended afterwards."""
    deadline = time.monotonic() + seconds
    results: list[tuple[list[str], str | None]] = []
    with contextlib.ExitStack() as stack:
        started = [_start(words, stack) for words in trials]
        for process, output, errors in started:
            late = False
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                _end(process)
            said = [line for line in _lines(output) if line.startswith("{")]
            why = f"took longer than {seconds:.0f} s" if late else _why(process, _lines(errors))
            results.append((said, why))
    return results


def _start(
    words: list[str], stack: contextlib.ExitStack
) -> tuple["subprocess.Popen[bytes]", IO[bytes], IO[bytes]]:
    # Into files, as a full pipe would stop a process.
    output = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    errors = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-m", "sedd_scale.doctor.trials", *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        env=trial_environment(),
    )
    stack.callback(_end, process)
    return process, output, errors


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    text = file.read().decode("utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _why(process: "subprocess.Popen[bytes]", errors: list[str]) -> str | None:
    code = process.returncode
    if code == 0:
        return None
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"failed: {errors[-1]}" if errors else f"ended with exit code {code}"
