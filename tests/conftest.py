"""Options and environment of all tests."""

import os

import pytest

# Tensors are small here and processes several: one thread each is the fastest, and sums come out
# the same in every process. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all layouts of all variants")
