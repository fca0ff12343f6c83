"""Kernels that a GPU's node compiles as it runs: whether they are wanted, and what they need."""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

SWITCH = "SEDD_COMPILE"
"""Environment variable: 0 runs everything one PyTorch operation at a time, without a compiler."""


@functools.cache
def compiles_kernels() -> bool:
    """Whether kernels are to be compiled where there is a GPU."""
    return os.environ.get(SWITCH, "1") != "0"


def compiler_fault() -> str | None:
    """What Triton lacks on this machine to compile its launchers, and the fix; None: nothing."""
    given = os.environ.get("CC")
    names = [given] if given else ["gcc", "clang", "cc"]
    without = f"or set {SWITCH}=0, which is slower"
    if not any(shutil.which(name) for name in names):
        return f"no C compiler ({' or '.join(names)}): install gcc, load its module, {without}"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"{header} is not there: install the headers of this Python (python3-dev), {without}"
    return None
