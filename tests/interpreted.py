"""Kernels run by Triton's interpreter, which is decided when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from packaging.version import Version

from tests.repository import ROOT


def run_interpreted(worker: Path, folder: Path) -> Any:
    """What `python WORKER FILE` saves in FILE with `torch.save`, its kernels interpreted."""
    import triton

    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version(
        "2.4"
    ):
        pytest.skip("the interpreter of Triton before 3.7 does not run with numpy 2.4")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    path = folder / "found.pt"
    done = subprocess.run(
        [sys.executable, worker, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path, weights_only=False)
