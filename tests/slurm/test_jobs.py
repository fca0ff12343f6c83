"""The job scripts on a real cluster: a chain of jobs through a requeue, a bad node and a failure.

The longer proof is campaign.py.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sedd_scale import load_pretrained
from sedd_scale.__main__ import main
from sedd_scale.cluster.run_status import format_status, run_status
from tests.slurm.jobs import (
    PREPARE,
    REPOSITORY,
    TINY,
    Desk,
    Job,
    ledger,
    losses,
    small_corpus,
)

STEPS, STOP_AFTER = 12, 4
AFTER = "--kill-on-invalid-dep=yes --dependency=afterok:"
TRAIN = (*TINY, "parallel.tensor=2", "parallel.pipeline=2", f"training.steps={STEPS}")
EVAL = ("--draws", "4", "--max-blocks", "8", "--batch-size", "4")
GENERATE = ("--steps", "6", "--batch-size", "2", "--seed", "3")
PROMPTS = [
    {"prefix": "river", "id": "first"},
    {"prefix": "stone", "num_samples": 3},
    {"text": "mask [blank:4] river", "id": "blank"},
    {"suffix": "mask", "seed": 7},
]


@dataclass(frozen=True)
class Chain:
    """All jobs, ended, and where their results are."""

    folder: Path
    jobs: dict[str, Job]

    @property
    def run_dir(self) -> Path:
        """Of the training run."""
        return self.folder / "run"


@pytest.fixture(scope="module")
def chain(desk: Desk) -> Chain:
    """Prepare, then train through a requeue, then evaluate and generate; beside it, failures."""
    folder = desk.folder / "chain"
    data, run_dir = folder / "data", folder / "run"
    texts = small_corpus(folder / "text")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    jobs: dict[str, Job] = {}
    jobs["no text"] = desk.submit(
        *("prepare_data.sh", "--input", str(folder / "none/*.txt"), *PREPARE),
        SEDD_OUTPUT=folder / "nothing",
    )
    jobs["after no text"] = desk.submit(
        *("eval_ppl.sh", "--data", str(folder / "nothing")),
        flags=f"--ntasks-per-node=1 {AFTER}{jobs['no text'].number}",
        SEDD_OUTPUT=folder / "never.json",
    )
    jobs["prepare"] = desk.submit(
        *("prepare_data.sh", "--input", texts, *PREPARE), SEDD_OUTPUT=data
    )
    jobs["train"] = desk.submit(
        *("train_large.sh", *TRAIN, f"data.path={data}", "checkpoint.every=5"),
        flags=f"--nodes=2 --ntasks-per-node=2 {AFTER}{jobs['prepare'].number}",
        SEDD_RUN_DIR=run_dir,
    )
    after = f"{AFTER}{jobs['train'].number}"
    jobs["evaluate"] = desk.submit(
        *("eval_ppl.sh", "--data", str(data), *EVAL),
        flags=f"--nodes=2 --ntasks-per-node=1 {after}",
        SEDD_CHECKPOINT=run_dir,
        SEDD_OUTPUT=folder / "two nodes.json",
    )
    if desk.cluster.namespaces:  # a file system that is gone on one node
        (folder / "mounted").mkdir()
        mount = ("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder / "mounted"))
        desk.cluster.on_node("node1", *mount)
    jobs["generate"] = desk.submit(
        *("generate.sh", "--prompts", str(prompts), *GENERATE),
        flags=f"--nodes=2 --ntasks-per-node=1 --exclude=node3 {after}",
        SEDD_CHECKPOINT=run_dir,
        SEDD_OUTPUT=folder / "mounted/samples.jsonl",
        SEDD_HEALTH=1,
    )
    jobs["convert"] = desk.submit(
        *("convert.sh", "--from", "native", "--to", "sedd-hf"),
        flags=after,
        SEDD_CHECKPOINT=run_dir,
        SEDD_OUTPUT=folder / "exported",
    )
    # More tasks than batches.
    array = desk.submit(
        *("generate.sh", f"--prompts={prompts}", *GENERATE),
        flags=f"--array=0-4 --ntasks-per-node=1 {after}",
        SEDD_CHECKPOINT=run_dir,
        SEDD_OUTPUT=folder / "array.jsonl",
    )
    jobs["no network"] = desk.submit(
        "eval_ppl.sh",
        *("--data", str(data)),
        flags="--nodes=2 --ntasks-per-node=1",
        SEDD_OUTPUT=folder / "no network.json",
        SEDD_HEALTH=1,
        SEDD_INTERFACE="nosuch0",
        SEDD_MAX_STALLED=2,
    )

    jobs["train"].wait_for_text(f"step {STOP_AFTER}/{STEPS}")
    jobs["train"].signal("USR1")
    desk.local(
        *(
            "-m",
            "sedd_scale",
            "train",
            "configs/runs/tiny.yaml",
            "--run-dir",
            str(folder / "one machine"),
        ),
        *(*TRAIN, f"data.path={data}"),
        num_processes=4,
    )
    jobs["train"].wait()
    slow = [{**PROMPTS[2], "id": number, "steps": steps} for number, steps in enumerate(STEPS_EACH)]
    (folder / "slow.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    tasks = desk.submit(
        *("generate.sh", "--prompts", str(folder / "slow.jsonl"), "--batch-size", "1"),
        flags="--array=0-2 --ntasks-per-node=1",
        SEDD_CHECKPOINT=run_dir,
        SEDD_OUTPUT=folder / "slow.jsonl.drawn",
    )
    one_process = [
        ["generate", "--checkpoint", str(run_dir), "--prompts", str(prompts)],
        ["eval_ppl", "--checkpoint", str(run_dir), "--data", str(data), "--json"],
    ]
    one_process[0] += [*GENERATE, "--output", str(folder / "one.jsonl")]
    one_process[1] += EVAL
    said = desk.local("-c", ONE_PROCESS, json.dumps(one_process))
    (folder / "one.json").write_text(said.splitlines()[-1])
    for job in jobs.values():
        job.wait()
    for number in numbers_of(desk, array):
        jobs[f"array {number}"] = desk.job(number)
        jobs[f"array {number}"].wait()
    # The last task has the number of the whole; the one before it has ended, the first has not.
    first, fast, last = (desk.job(number) for number in numbers_of(desk, tasks))
    assert last.number == tasks.number
    fast.wait()
    last.wait_for_text("start 0")
    desk.cluster.command("scancel", "-s", "USR1", f"{tasks.number}_2")
    last.wait_for_text("goes on at")
    jobs |= {"first task": first, "fast task": fast, "last task": last}
    (folder / "states.json").write_text(json.dumps([first.state, fast.state, last.state]))
    desk.cluster.command("scancel", tasks.number)
    return Chain(folder, jobs)


# Of the prompts of an array whose tasks end at different times.
STEPS_EACH = (30_000, 4, 30_001)


def numbers_of(desk: Desk, array: Job) -> list[str]:
    """Numbers of an array's tasks, in their order."""
    flags = ("-h", "-r", "-j", array.number, "-t", "all", "-o", "%K %A")
    lines = desk.cluster.command("squeue", *flags).splitlines()
    return [line.split()[1] for line in sorted(lines, key=lambda line: int(line.split()[0]))]


# The imports of two commands, once.
ONE_PROCESS = """
import json, sys
from sedd_scale.__main__ import main
for words in json.loads(sys.argv[1]):
    code = main(words)
    assert code == 0, code
"""


def samples(path: Path) -> list[dict[str, Any]]:
    """The records without their times."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: record[key] for key in record if key != "seconds"} for record in records]


def test_two_nodes_and_a_requeue_train_as_one_machine_does(chain: Chain) -> None:
    assert chain.jobs["train"].state == "COMPLETED", chain.jobs["train"].text()
    assert losses(chain.run_dir) == losses(chain.folder / "one machine")
    assert sorted(losses(chain.run_dir)) == list(range(1, STEPS + 1))


def test_a_signal_saves_and_requeues(chain: Chain) -> None:
    job = chain.jobs["train"]
    first, end, second, last = ledger(chain.run_dir, job)
    assert (first["event"], first["restart"], first["progress"]) == ("begin", 0, 0)
    assert (end["code"], end["requeued"]) == (75, True)
    assert STOP_AFTER <= end["progress"] < STEPS
    assert (second["restart"], second["progress"]) == (1, end["progress"])
    assert (last["code"], last["requeued"], last["progress"]) == (0, False, STEPS)
    assert f"resumed {chain.run_dir}/checkpoints/step-{end['progress']}" in job.text()


def test_the_environment_is_printed_once_and_fits_the_allocation(chain: Chain) -> None:
    text = chain.jobs["train"].text()
    assert len(re.findall(r"  MASTER_ADDR=node\d\n", text)) == 1
    assert "  SEDD_TASKS_PER_NODE=2\n" in text and "  OMP_NUM_THREADS=1\n" in text


def test_status_tells_how_the_run_stands(
    chain: Chain, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", desk.cluster.environment["SLURM_CONF"])
    status = run_status(chain.run_dir)
    assert (status["job"], status["state"]) == (chain.jobs["train"].number, "COMPLETED")
    assert (status["restarts"], status["step"], status["steps"]) == (1, STEPS, STEPS)
    assert status["seconds_left"] == 0
    assert f"{STEPS} of {STEPS}" in format_status(status)


def test_evaluation_on_two_nodes_is_that_of_one_process(chain: Chain) -> None:
    assert chain.jobs["evaluate"].state == "COMPLETED", chain.jobs["evaluate"].text()
    two, one = (
        json.loads((chain.folder / name).read_text()) for name in ("two nodes.json", "one.json")
    )
    for report in (two, one):
        del report["seconds"]
    assert two == one


def test_generation_on_two_nodes_is_that_of_one_process(chain: Chain) -> None:
    assert chain.jobs["generate"].state == "COMPLETED", chain.jobs["generate"].text()
    assert samples(chain.folder / "mounted/samples.jsonl") == samples(chain.folder / "one.jsonl")


def test_an_array_draws_what_one_process_does(chain: Chain) -> None:
    assert samples(chain.folder / "array.jsonl") == samples(chain.folder / "one.jsonl")
    assert not list(chain.folder.glob("array.shard-*"))
    tasks = [job for name, job in chain.jobs.items() if name.startswith("array")]
    assert [job.state for job in tasks] == ["COMPLETED"] * 5
    assert any("no batch is left for this shard" in job.text() for job in tasks)


def test_a_task_requeues_itself_alone(chain: Chain) -> None:
    first, fast, last = (chain.jobs[f"{name} task"] for name in ("first", "fast", "last"))
    states = json.loads((chain.folder / "states.json").read_text())
    assert states == ["RUNNING", "COMPLETED", "RUNNING"]
    assert [job.field("Restarts") for job in (first, fast)] == ["0", "0"]
    assert "start 1 of job" in last.text() and "requeued: at" in last.text()
    assert first.text().count("start ") == fast.text().count("start ") == 1


def test_a_conversion_gives_the_run_in_the_published_format(chain: Chain) -> None:
    assert chain.jobs["convert"].state == "COMPLETED", chain.jobs["convert"].text()
    exported, of_run = (
        dict(load_pretrained(path).named_parameters())
        for path in (chain.folder / "exported", chain.run_dir)
    )
    assert exported.keys() == of_run.keys()
    assert all(torch.equal(weight, of_run[name]) for name, weight in exported.items())


def test_a_bad_node_is_named_and_left_out(chain: Chain, desk: Desk) -> None:
    if not desk.cluster.namespaces:
        pytest.skip("nodes share this machine's mounts: none can be made bad")
    job = chain.jobs["generate"]
    assert "health: node1: " in job.text() and "BAD: cannot use" in job.text()
    assert "requeued, without node1" in job.text()
    assert job.field("ExcNodeList") in ("node[1,3]", "node1,node3")
    assert job.field("NodeList") == "node[0,2]"
    assert "health: all-reduce of 64 MiB over 2 tasks" in job.text()


def test_a_chain_stops_at_its_first_failure(chain: Chain) -> None:
    assert chain.jobs["no text"].state == "FAILED"
    assert chain.jobs["no text"].field("Restarts") == "0"
    assert "not requeued: an error to mend" in chain.jobs["no text"].text()
    assert chain.jobs["after no text"].state == "CANCELLED"


def test_a_job_without_progress_stops_and_says_why(chain: Chain) -> None:
    job = chain.jobs["no network"]
    assert job.state == "FAILED" and job.field("Restarts") == "1"
    assert "nosuch0" in job.text()
    assert "not requeued: no progress in 2 starts in a row" in job.text()


def test_slurm_accepts_a_rendered_job_file(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["configs/runs/openwebtext_xl.yaml", "--run-dir", str(tmp_path / "xl"), "--dry-run"]
    words += ["--vocab-size=50257", "--gpus=32", "--cpu", "--gpus-per-node=8"]
    assert main(["submit", *words]) == 0
    job_file = tmp_path / "job.sbatch"
    job_file.write_text(capsys.readouterr().out)
    assert not (tmp_path / "xl").exists()
    done = subprocess.run(
        ["sbatch", "--test-only", str(job_file)],
        env=desk.cluster.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "using 256 processors on nodes" in done.stderr


@pytest.mark.parametrize("script", ["train_small.sh", "train_medium.sh", "train_large.sh"])
def test_slurm_accepts_the_flags_of_every_size(desk: Desk, script: str) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", "--gpus-per-node=0", f"slurm/{script}"],
        cwd=REPOSITORY,
        env=desk.cluster.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_job_scripts_pass_shellcheck() -> None:
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists():
        pytest.skip("shellcheck is not installed: pip install -e '.[dev]'")
    scripts = sorted((REPOSITORY / "slurm").glob("*.sh"))
    assert len(scripts) == 8
    done = subprocess.run([program, *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
