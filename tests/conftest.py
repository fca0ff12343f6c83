"""Options and environment of all tests."""

import os
import signal

import pytest

# Tensors are small here and processes several: one thread each is the fastest, and sums come out
# the same in every process. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all layouts of all variants")


_AT_START = signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let signals through that a training in this process has blocked for good at its end.

    Programs that a later test starts would inherit that, and outlive their SIGTERM.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, _AT_START)
