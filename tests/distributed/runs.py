"""Real training runs for the tests: many runs to a launch, so that imports are paid for once."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("train_worker.py")


@dataclass(frozen=True)
class Run:
    """One training run: where it goes and what it changes in configs/runs/tiny.yaml."""

    run_dir: Path
    overrides: tuple[str, ...]

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").open()]

    def series(self, key: str) -> list[float]:
        """One number of metrics.jsonl, step after step."""
        return [line[key] for line in self.lines() if key in line]


def launch(num_processes: int, arguments: list[str], timeout: float = 600.0) -> str:
    """Run a Python program in `num_processes` processes; its output, or a failure that shows it."""
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_processes), *arguments),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-6000:]
    return output


def train_runs(num_processes: int, runs: list[Run], jobs_file: Path) -> None:
    """Train the runs, one after the other, in one launch."""
    jobs = [
        {
            "config": "configs/runs/tiny.yaml",
            "run_dir": str(run.run_dir),
            "overrides": list(run.overrides),
        }
        for run in runs
    ]
    jobs_file.write_text(json.dumps(jobs))
    launch(num_processes, [str(WORKER), str(jobs_file)])
