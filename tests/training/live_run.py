"""Real processes of tools/train.py, without a launcher, to be signalled while they train."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = ("tools/train.py", "configs/runs/tiny.yaml")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    """What every process of a run gets."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


class LiveRun:
    """The ranks of one run of tools/train.py, started; use it in a `with`, which ends what is left.

    Args:
        logs: gets rank-N.out and rank-N.err.
    """

    def __init__(
        self, num_processes: int, run_dir: Path, overrides: tuple[str, ...], logs: Path
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.run_dir, self._logs = run_dir, logs
        port = str(free_port())
        self._processes = []
        for rank in range(num_processes):
            place = environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            out, err = (logs / f"rank-{rank}.{end}" for end in ("out", "err"))
            with out.open("w") as stdout, err.open("w") as stderr:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, *TRAIN, "--run-dir", str(run_dir), *overrides],
                        cwd=REPOSITORY,
                        env=place,
                        stdout=stdout,
                        stderr=stderr,
                    )
                )

    def __enter__(self) -> "LiveRun":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def send(self, number: signal.Signals, rank: int) -> None:
        """Signal one rank."""
        self._processes[rank].send_signal(number)

    def until(self, holds: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until something holds, while all ranks run."""
        deadline = time.monotonic() + seconds
        while not holds():
            codes = [process.poll() for process in self._processes]
            assert codes == [None] * len(codes), (codes, self.errors())
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.001)

    def until_step(self, step: int) -> None:
        """Wait until metrics.jsonl holds the step."""
        self.until(lambda: last_step(self.run_dir) >= step)

    def codes(self, seconds: float = 120.0) -> list[int]:
        """The exit codes, when all ranks have ended."""
        deadline = time.monotonic() + seconds
        codes = []
        for process in self._processes:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        return codes

    def errors(self, rank: int | None = None) -> str:
        """What one rank, or all, wrote to stderr."""
        ranks = range(len(self._processes)) if rank is None else [rank]
        return "".join((self._logs / f"rank-{rank}.err").read_text() for rank in ranks)

    def output(self) -> str:
        """What rank 0 wrote to stdout."""
        return (self._logs / "rank-0.out").read_text()


def last_step(run_dir: Path) -> int:
    """Of metrics.jsonl's whole lines; 0 where there is none."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text().split("\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of every step that metrics.jsonl holds."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
