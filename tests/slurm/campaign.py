"""The long proof of slurm/: limits, preemption, kills and dead nodes on a real cluster.

    sudo .venv/bin/python tests/slurm/campaign.py               # all
    sudo .venv/bin/python tests/slurm/campaign.py limit rank    # some

Every run is 2 nodes x 2 processes, tensor-parallel within a node and pipeline-parallel across, and
is compared, number by number, with a run of the same layout on one machine that nothing disturbed.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sedd_scale.cluster.restarts import progress_of  # noqa: E402
from tests.slurm.cluster import Cluster, NoCluster, Settings  # noqa: E402
from tests.slurm.jobs import (  # noqa: E402
    PREPARE,
    TINY,
    Desk,
    Job,
    ledger,
    losses,
    small_corpus,
    small_dataset,
)

EVERY = 20
TWO_BY_TWO = "--nodes=2 --ntasks-per-node=2"
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
SLOW = 1800.0
Case = Callable[["Proof"], str]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case under its name."""
    CASES[function.__name__] = function
    return function


class Proof:
    """The cluster, the data, and the undisturbed run that all others must equal."""

    def __init__(self, desk: Desk, folder: Path, steps: int, minutes: int) -> None:
        self.desk, self.folder, self.steps, self.minutes = desk, folder, steps, minutes
        self.data = small_dataset(folder / "corpus")
        self.reference = folder / "reference"
        started = time.monotonic()
        desk.local(
            *(
                "-m",
                "sedd_scale",
                "train",
                "configs/runs/tiny.yaml",
                "--run-dir",
                str(self.reference),
            ),
            *self.overrides(),
            num_processes=4,
        )
        print(f"reference: {steps} steps on one machine, {time.monotonic() - started:.0f} s")

    def overrides(self) -> tuple[str, ...]:
        """What the runs change in configs/runs/tiny.yaml."""
        return (
            *(f"data.path={self.data}", *TINY, *LAYOUT, f"training.steps={self.steps}"),
            *(f"checkpoint.every={EVERY}", "checkpoint.keep=0"),
        )

    def train(
        self,
        name: str,
        *more: str,
        script: str = "train_large.sh",
        flags: str = "",
        **settings: object,
    ) -> tuple[Path, Job]:
        """Submit a training script of slurm/; its run directory and job."""
        run_dir = self.folder / name
        job = self.desk.submit(
            *(script, *self.overrides(), *more),
            flags=f"{TWO_BY_TWO} {flags}",
            SEDD_RUN_DIR=run_dir,
            **settings,
        )
        return run_dir, job

    def check_equal(self, run_dir: Path) -> None:
        """The run's numbers are those of the undisturbed one, bit for bit."""
        expected, found = losses(self.reference), losses(run_dir)
        assert len(expected) == self.steps
        differ = {step for step in expected if found.get(step) != expected[step]}
        assert not differ, f"{len(differ)} steps differ, the first is {min(differ)}"

    def finish(self, run_dir: Path, job: Job) -> None:
        """Wait for the job's good end and compare."""
        assert job.wait(seconds=SLOW) == "COMPLETED", job.text()[-3000:]
        self.check_equal(run_dir)


def wait_for_step(job: Job, run_dir: Path, step: int) -> None:
    """Wait until the run has done a step."""

    def reached() -> bool:
        return (run_dir / "metrics.jsonl").exists() and max(losses(run_dir), default=0) >= step

    job.wait_for(reached, f"to reach step {step}", SLOW)


def starts(run_dir: Path, job: Job) -> list[int]:
    """The saved step at which each start of the job began."""
    return [line["progress"] for line in ledger(run_dir, job) if line["event"] == "begin"]


def process_of(job: Job, rank: int) -> int:
    """The trainer of one rank of the job."""
    marks = {f"SLURM_JOB_ID={job.number}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if marks <= set(words) and b"\0train\0" in command and b"SLURM_STEP_ID" in b"".join(words):
            return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


@case
def layout(proof: Proof) -> str:
    """Two nodes, by srun and by torchrun, with a check of the nodes first."""
    runs = []
    for launcher, script in (("srun", "train_large.sh"), ("torchrun", "train_medium.sh")):
        run_dir, job = proof.train(
            f"layout-{launcher}", script=script, SEDD_LAUNCHER=launcher, SEDD_HEALTH=1
        )
        proof.finish(run_dir, job)
        took = re.search(r"all-reduce of .*", job.text())
        assert took is not None
        runs.append(f"{launcher} equal ({took[0]})")
    return "; ".join(runs)


@case
def data(proof: Proof) -> str:
    """Two nodes of one process, which share the batch: equal to two processes of one machine."""
    keys = (f"data.path={proof.data}", *TINY, "parallel.zero_stage=2", "training.steps=40")
    here = proof.folder / "data-reference"
    proof.desk.local(
        *("-m", "sedd_scale", "train", "configs/runs/tiny.yaml", "--run-dir", str(here), *keys),
        num_processes=2,
    )
    run_dir = proof.folder / "data"
    job = proof.desk.submit(
        *("train_small.sh", *keys),
        flags="--nodes=2 --ntasks-per-node=1",
        SEDD_RUN_DIR=run_dir,
    )
    assert job.wait(seconds=SLOW) == "COMPLETED", job.text()[-3000:]
    assert losses(run_dir) == losses(here) and len(losses(here)) == 40
    return "ZeRO 2 on 2 nodes x 1 process, equal"


@case
def limit(proof: Proof) -> str:
    """A time limit too short for the work, by --signal alone."""
    run_dir, job = proof.train("limit", flags=f"--time={proof.minutes} --signal=USR1@45")
    proof.finish(run_dir, job)
    begun = starts(run_dir, job)
    assert len(begun) > 1, "the limit was not too short: give more --steps"
    return f"limit {proof.minutes} min, {len(begun) - 1} requeues, starts at steps {begun}"


@case
def torchrun_signal(proof: Proof) -> str:
    """USR1 to every process of a step that torchrun's agents lead."""
    run_dir, job = proof.train("torchrun-signal", SEDD_LAUNCHER="torchrun")
    wait_for_step(job, run_dir, EVERY + 5)
    job.signal("USR1")
    proof.finish(run_dir, job)
    begun = starts(run_dir, job)
    assert len(begun) == 2 and begun[1] > EVERY, begun
    return f"went on at step {begun[1]}"


@case
def preemption(proof: Proof) -> str:
    """A job of a higher tier takes the nodes; SIGTERM, grace, requeue, resume."""
    run_dir, job = proof.train("preemption")
    wait_for_step(job, run_dir, EVERY + 5)
    urgent = proof.desk.cluster.command(
        *("sbatch", "--parsable", "--partition=urgent", "--nodes=3", "--exclusive"),
        *("--output=/dev/null", "--wrap=sleep 5"),
    )
    proof.finish(run_dir, job)
    assert proof.desk.job(urgent.strip()).state == "COMPLETED"
    ends = [line for line in ledger(run_dir, job) if line["event"] == "end"]
    assert ends[0]["code"] == 75 and ends[0]["requeued"], ends
    return f"saved at step {ends[0]['progress']}, went on after the other job"


@case
def cancel(proof: Proof) -> str:
    """scancel saves and does not requeue."""
    run_dir, job = proof.train("cancel")
    wait_for_step(job, run_dir, EVERY + 5)
    job.cancel()
    assert job.wait() == "CANCELLED"
    time.sleep(20)
    assert job.state == "CANCELLED" and len(starts(run_dir, job)) == 1, job.state
    saved = progress_of(run_dir)
    assert saved > EVERY, job.text()[-2000:]
    return f"saved at step {saved}, and ended"


@case
def rank(proof: Proof) -> str:
    """SIGKILL to one rank in the middle."""
    run_dir, job = proof.train("rank")
    wait_for_step(job, run_dir, 2 * EVERY + 5)
    os.kill(process_of(job, 3), signal.SIGKILL)
    killed_at = max(losses(run_dir))
    proof.finish(run_dir, job)
    begun = starts(run_dir, job)
    assert len(begun) == 2 and killed_at - begun[1] <= EVERY, (killed_at, begun)
    return f"killed at step {killed_at}, went on at step {begun[1]}"


@case
def slurmd(proof: Proof) -> str:
    """SIGKILL to one node's slurmd, which comes back later: the job goes on elsewhere."""
    cluster = proof.desk.cluster
    run_dir, job = proof.train("slurmd")
    wait_for_step(job, run_dir, EVERY + 5)
    nodes = job.field("NodeList")
    cluster.kill_slurmd("node1")
    try:
        job.wait_for(lambda: len(starts(run_dir, job)) > 1, "to be requeued", SLOW)
        elsewhere = job.field("NodeList")
        proof.finish(run_dir, job)
    finally:
        cluster.up()
    begun = starts(run_dir, job)
    return f"from {nodes} to {elsewhere}, went on at step {begun[1]}"


@case
def node(proof: Proof) -> str:
    """Power off a node: the job goes on with the nodes that are left."""
    cluster = proof.desk.cluster
    if not cluster.namespaces:
        return "left out: nodes of this machine cannot be switched off"
    run_dir, job = proof.train("node", SEDD_HEALTH=1)
    wait_for_step(job, run_dir, EVERY + 5)
    killed_at = max(losses(run_dir))
    cluster.kill_node("node1")
    try:
        proof.finish(run_dir, job)
        nodes = job.field("NodeList")
    finally:
        cluster.up()
    begun = starts(run_dir, job)
    assert killed_at - begun[-1] <= EVERY, (killed_at, begun)
    return f"off at step {killed_at}, went on at step {begun[-1]} on {nodes}"


@case
def submit(proof: Proof) -> str:
    """sedd-scale submit: plan, snapshot, job, status while it runs and after."""
    run_dir = proof.folder / "submitted"
    environment = proof.desk.cluster.environment
    os.environ["SLURM_CONF"] = environment["SLURM_CONF"]
    words = [
        *(
            "-m",
            "sedd_scale",
            "submit",
            "configs/runs/tiny.yaml",
            "--run-dir",
            str(run_dir),
            "--cpu",
        ),
        *("--gpus=4", "--gpus-per-node=2", "--cpus-per-task=1", *proof.overrides()),
    ]
    said = proof.desk.local(*words)
    number = re.match(r"job (\d+): 4 processes on 2 nodes", said)
    assert number is not None, said
    job = Job(proof.desk.cluster, number[1], run_dir / f"slurm/{number[1]}.log")
    wait_for_step(job, run_dir, EVERY)
    running = proof.desk.local("-m", "sedd_scale", "submit", "status", str(run_dir))
    assert f"{number[1]}, RUNNING" in running and "work left" in running, running
    proof.finish(run_dir, job)
    after = proof.desk.local("-m", "sedd_scale", "submit", "status", str(run_dir))
    assert f"{number[1]}, COMPLETED" in after, after
    print("\n".join(f"    {line}" for line in running.splitlines()))
    return said.strip()


@case
def chain(proof: Proof) -> str:
    """prepare -> train -> eval -> generate by afterok; then a chain whose training fails."""
    states = []
    for name, fault in (("whole", ()), ("broken", ("model.num_heads=3",))):
        folder = proof.folder / f"chain-{name}"
        prepared = proof.desk.submit(
            *("prepare_data.sh", "--input", small_corpus(folder / "text"), *PREPARE),
            SEDD_OUTPUT=folder / "data",
        )
        after = "--kill-on-invalid-dep=yes --dependency=afterok:"
        run_dir = folder / "run"
        trained = proof.desk.submit(
            *("train_small.sh", *proof.overrides(), f"data.path={folder / 'data'}"),
            *("training.steps=20", *fault),
            flags=f"{TWO_BY_TWO} {after}{prepared.number}",
            SEDD_RUN_DIR=run_dir,
        )
        evaluated = proof.desk.submit(
            *("eval_ppl.sh", "--data", str(folder / "data"), "--draws", "4"),
            flags=f"--nodes=2 --ntasks-per-node=1 {after}{trained.number}",
            SEDD_CHECKPOINT=run_dir,
            SEDD_OUTPUT=folder / "eval.json",
        )
        generated = proof.desk.submit(
            *("generate.sh", "--num-samples", "4", "--steps", "8"),
            flags=f"--nodes=2 --ntasks-per-node=1 {after}{evaluated.number}",
            SEDD_CHECKPOINT=run_dir,
            SEDD_OUTPUT=folder / "samples.jsonl",
        )
        jobs = (prepared, trained, evaluated, generated)
        states.append([job.wait(seconds=SLOW) for job in jobs])
    assert states[0] == ["COMPLETED"] * 4, states
    assert states[1] == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"], states
    return f"{', '.join(states[0])}; with a bad key: {', '.join(states[1])}"


def main() -> int:
    """Run the cases and print what each came to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--steps", type=int, default=400, help="of every run (%(default)s)")
    parser.add_argument("--minutes", type=int, default=2, help="time limit (%(default)s)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder / "cluster", Settings(nodes=3))
    failed = 0
    try:
        cluster.up()
        (folder / "jobs").mkdir()
        desk = Desk(cluster, folder / "jobs")
        proof = Proof(desk, folder / "proof", arguments.steps, arguments.minutes)
        for name in arguments.cases or CASES:
            started = time.monotonic()
            try:
                outcome = "passed: " + CASES[name](proof)
            except (AssertionError, TimeoutError, NoCluster) as error:
                outcome, failed = f"FAILED: {error}", failed + 1
            print(f"{name} ({time.monotonic() - started:.0f} s) {outcome}", flush=True)
    finally:
        cluster.down()
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
