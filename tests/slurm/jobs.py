"""Jobs on the test cluster: submit, wait, and read what came of them."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_scale.preparation.prepare import prepare
from tests.slurm.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
# A run of seconds; the same numbers under any layout of up to 4 processes.
TINY = (
    "training.valid_every=0",
    "logging.every=1",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# What the job scripts find in the environment of whoever runs the tests does not count.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "SEDD_PYTHON": sys.executable,
    "SEDD_HEALTH": "0",
    "SEDD_LOST_SECONDS": "15",
    "SEDD_CONFIG": "configs/runs/tiny.yaml",
    "SEDD_MIN_DISK_GB": "0.1",
    "SEDD_MIN_MEMORY_GB": "0.1",
}


@dataclass(frozen=True)
class Job:
    """One submitted job."""

    cluster: Cluster
    number: str
    log: Path

    def field(self, name: str) -> str:
        """What `scontrol show job` says."""
        words = self.cluster.command("scontrol", "show", "job", "-o", self.number).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    @property
    def state(self) -> str:
        """Slurm's word for where the job is."""
        return self.field("JobState")

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, *states: str, seconds: float = 400.0) -> str:
        """Wait until it is in one of these states (default: it has ended)."""
        wanted = states or ENDED
        self.wait_for(lambda: self.state in wanted, f"to be {' or '.join(wanted)}", seconds)
        return self.state

    def wait_for_text(self, text: str, seconds: float = 400.0) -> None:
        """Wait until the log has a text."""
        self.wait_for(lambda: text in self.text(), f"to say {text!r}", seconds)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 400.0) -> None:
        """Wait until a condition holds; a job that ends before, or takes longer, is shown."""
        end = time.monotonic() + seconds
        while not condition():
            ended = self.state in ENDED and not condition()
            assert not ended and time.monotonic() < end, (
                f"job {self.number} ({self.state}) was {what}; its log:\n{self.text()[-5000:]}"
            )
            time.sleep(0.3)

    def signal(self, name: str) -> None:
        """Signal the job's steps, as --signal does."""
        self.cluster.command("scancel", "-s", name, self.number)

    def cancel(self) -> None:
        """scancel, as a user would."""
        self.cluster.command("scancel", self.number)


@dataclass(frozen=True)
class Desk:
    """Submits jobs whose files are all in one folder."""

    cluster: Cluster
    folder: Path

    def submit(self, script: str, *arguments: str, flags: str = "", **settings: object) -> Job:
        """sbatch a script of slurm/; `settings` are environment variables."""
        log = self.folder / "%j.log"
        words = [f"slurm/{script}", *arguments]
        environment = {**SETTINGS, **{name: str(value) for name, value in settings.items()}}
        done = subprocess.run(
            [
                *("sbatch", "--parsable", f"--output={log}", "--gpus-per-node=0"),
                *("--cpus-per-task=1", "--mem=1000", *flags.split(), *words),
            ],
            cwd=REPOSITORY,
            env={**self.cluster.environment, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return self.job(done.stdout.strip())

    def job(self, number: str) -> Job:
        """A job by its number."""
        return Job(self.cluster, number, self.folder / f"{number}.log")

    def local(self, *words: str, num_processes: int = 1) -> str:
        """The output of a Python program on this machine, by torchrun if in several processes."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        started = [*launcher, str(num_processes)] if num_processes > 1 else []
        done = subprocess.run(
            [sys.executable, *started, *words],
            cwd=REPOSITORY,
            env={**self.cluster.environment, **SETTINGS, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def small_corpus(folder: Path) -> str:
    """Forty documents of three words; the glob of their files."""
    folder.mkdir(parents=True)
    for index in range(40):
        words = ["river", "stone", "mask"]
        text = " ".join(words[(index * k + k // 3) % 3] for k in range(120))
        (folder / f"{index}.txt").write_text(text)
    return str(folder / "*.txt")


PREPARE = ("--tokenizer", "bytes", "--block-length", "32", "--valid-fraction", "0.2")


def small_dataset(folder: Path) -> Path:
    """The small corpus as bytes, in blocks of 32."""
    texts = small_corpus(folder)
    prepare(
        [texts],
        output=folder / "prepared",
        block_length=32,
        tokenizer="bytes",
        valid_fraction=0.2,
    )
    return folder / "prepared"


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


def ledger(run_dir: Path, job: Job) -> list[dict[str, Any]]:
    """What launch.sh noted of the job's starts and ends."""
    path = run_dir / "slurm" / f"attempts-{job.number}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
