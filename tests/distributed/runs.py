"""Real training runs for the tests: many runs to a launch, so that imports are paid for once."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.repository import ROOT

WORKER = Path(__file__).with_name("train_worker.py")

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["sedd_scale.training.loop", "sedd_scale.evaluation.likelihood"])


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
    """Run a Python program in `num_processes` processes; its output, or a failure that shows it.

    As torchrun does, but for the imports: processes are forked from one that has made them, before
    it started any thread.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        common = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
        }
        probe.close()
        output = Path(folder, "output")
        processes = [
            _FORKS.Process(
                target=_run,
                args=(arguments, {**common, "RANK": rank, "LOCAL_RANK": rank}, output),
            )
            for rank in map(str, range(num_processes))
        ]
        for process in processes:
            process.start()
        codes = _wait(processes, timeout)
        text = output.read_text(errors="replace")
    assert codes == [0] * num_processes, f"exit codes {codes}\n{text[-6000:]}"
    return text


def _run(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """One process: what `python ARGUMENTS` would do."""
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


def _wait(processes: list[Any], timeout: float) -> list[int | None]:
    """The processes' exit codes, once all are done, one failed or the time is over."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in processes}
    while running and time.monotonic() < deadline:
        for sentinel in connection.wait(list(running), deadline - time.monotonic()):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                deadline = 0.0
    for process in running.values():
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


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
