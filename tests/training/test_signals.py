"""What a stop at a signal looks like to who started the run."""

import subprocess
import sys

import pytest

from sedd_scale.training.signals import EXIT_STOPPED, exit_code_after_stop


@pytest.mark.parametrize(
    ("variables", "code"),
    [
        ({}, EXIT_STOPPED),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, EXIT_STOPPED),
        ({"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, 0),
        ({"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RESTART_COUNT": "2"}, EXIT_STOPPED),
    ],
)
def test_who_would_restart_a_failed_process_is_told_of_success(
    variables: dict[str, str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert exit_code_after_stop() == code


PROGRAM = """
import os, signal
from sedd_scale.training.signals import StopSignals

stop = StopSignals()
stop.install()
os.kill(os.getpid(), signal.SIGUSR1)
assert not stop.wants_stop(), "it waits until there is something to save"
{early}
stop.arm()
assert stop.received is signal.SIGUSR1
os.kill(os.getpid(), signal.SIGTERM)
assert stop.received is signal.SIGUSR1
stop.disarm()
os.kill(os.getpid(), signal.SIGTERM)
print("over")
"""


@pytest.mark.parametrize(
    ("early", "code", "printed"),
    [("", 0, "over\n"), ("os.kill(os.getpid(), signal.SIGTERM)", -15, "")],
)
def test_signals_are_noted_from_the_first_step_to_the_end(
    early: str, code: int, printed: str
) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(early=early)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (finished.returncode, finished.stdout) == (code, printed), finished.stderr
