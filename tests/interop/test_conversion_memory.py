"""The memory of a conversion is that of the largest tensor, whatever the depth of the model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.conversion_memory_worker import DrawnSource
from tests.repository import ROOT

SHALLOW, DEEP = 2, 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks need Linux's /proc")
def test_conversions_hold_one_tensor_at_a_time(tmp_path: Path) -> None:
    finished = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "tests/interop/conversion_memory_worker.py"),
            *(str(tmp_path), str(SHALLOW), str(DEEP)),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            # What is freed goes back at once: else holes of the heap would count as well.
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = json.loads(finished.stdout.splitlines()[-1])
    peaks = {(row["conversion"], row["layers"]): row["peak_bytes"] for row in rows}
    assert len(peaks) == 8

    shallow, deep = (
        [4 * math.prod(shape) for shape in DrawnSource(layers).shapes.values()]
        for layers in (SHALLOW, DEEP)
    )
    largest, deeper = max(deep), sum(deep) - sum(shallow)
    for (conversion, num_layers), peak in peaks.items():
        # Two chunks of 4 MiB are hashed at a time.
        assert peak < 4 * largest + 2 * 2**22, (conversion, num_layers, peak, largest)
        if num_layers == DEEP:
            more = peak - peaks[conversion, SHALLOW]
            assert more < deeper / 4, (conversion, more, deeper)
