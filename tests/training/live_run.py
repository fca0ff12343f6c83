"""Real processes of sedd-scale train, without a launcher, to be signalled while they train."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.repository import ROOT

TRAIN = ("-m", "sedd_scale", "train", "configs/runs/tiny.yaml")
STEPS, EVERY = 120, 20
SMALL = (
    f"training.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    "training.valid_every=0",
    "logging.every=1",
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
)
"""Of a run of steps that take some milliseconds."""


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    """What every process of a run gets."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


class Torchrun:
    """A run of sedd-scale train on one node under torchrun; use it in a `with`, as `LiveRun`."""

    def __init__(
        self,
        num_processes: int,
        run_dir: Path,
        overrides: tuple[str, ...],
        log: Path,
        *options: str,
    ) -> None:
        self.run_dir, self._log = run_dir, log
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [
                    *launcher,
                    *(f"--nproc-per-node={num_processes}", *options, *TRAIN),
                    *("--run-dir", str(run_dir), *overrides),
                ],
                cwd=ROOT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            for process in [*self.workers(), self._process.pid]:
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        launcher = self._process.pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(child) for child in children if _is_rank(child)]

    def send_to_all(self, number: signal.Signals) -> None:
        """Signal the ranks, then the launcher, as a scheduler does."""
        for process in [*self.workers(), self._process.pid]:
            os.kill(process, number)

    def until(self, holds: Callable[[], bool], seconds: float = 120.0) -> None:
        """Wait until something holds, while the launcher runs."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.001)

    def code(self, seconds: float = 120.0) -> int:
        """The launcher's exit code, when it has ended."""
        return self._process.wait(seconds)

    def output(self) -> str:
        """What the launcher and its ranks wrote."""
        return self._log.read_text()


def _is_rank(process: str) -> bool:
    try:
        return TRAIN[-1] in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:  # it has just ended
        return False


class LiveRun:
    """The ranks of one training run, started; use it in a `with`, which ends what is left.

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
                        cwd=ROOT,
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

    def code(self, rank: int, seconds: float = 120.0) -> int:
        """A rank's exit code, when it has ended."""
        return self._processes[rank].wait(seconds)

    def codes(self) -> list[int]:
        """The exit codes, when all ranks have ended."""
        return [self.code(rank) for rank in range(len(self._processes))]

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
