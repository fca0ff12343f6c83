"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

# Tensors are small here and processes several: one thread each is the fastest, and sums come out
# the same in every process. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all layouts of all variants")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers beside the repository; skips the test where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference numbers: {folder} is absent")
    return folder
