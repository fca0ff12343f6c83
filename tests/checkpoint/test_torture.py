"""A short campaign of kills during saves; `make torture` plays five hundred rounds."""

import os
import re
import subprocess
import sys

from tests.repository import ROOT


def test_no_kill_during_a_save_loses_or_tears_a_checkpoint() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/checkpoint/torture.py", "--rounds", "12"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    summary = finished.stdout.splitlines()[-1]
    assert "no checkpoint lost or torn" in summary
    counts = dict(re.findall(r'"([a-z ]+)": (\d+)', summary))
    # A round may finish before its random moment or its point of a save comes.
    assert int(counts["killed"]) >= 3 and int(counts["resumed"]) >= 3, summary
    assert int(counts["damaged"]) >= 1, summary
