"""Sizes of jobs, their files, and what a submission keeps."""

from dataclasses import replace
from pathlib import Path

import pytest

from sedd_scale.__main__ import main
from sedd_scale.cluster.job_size import TIME_EXTRA, JobSize, job_size
from sedd_scale.cluster.submission import next_folder, render, snapshot, submitted_jobs
from sedd_scale.config import Config, load_config
from sedd_scale.errors import ConfigError
from sedd_scale.files.package import PACKAGE
from sedd_scale.planning.layouts import Plan, plan
from tests.repository import ROOT

XL = ROOT / "configs/runs/openwebtext_xl.yaml"
HOUR = 3600.0


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(load_config(XL, []), 32, vocab_size=50257, block_length=1024)


def size_of(planned: Plan, *, per_node: int = 8, hours: float = 10.0, longest: float = 24.0):
    return job_size(
        planned,
        tasks_per_node=per_node,
        run_seconds=hours * HOUR,
        longest_seconds=longest * HOUR,
    )


def test_nodes_and_time_follow_from_the_layout_and_the_estimate(planned: Plan) -> None:
    size = size_of(planned)
    assert (size.nodes, size.tasks_per_node, size.tasks) == (4, 8, 32)
    assert size.seconds == 12 * HOUR + TIME_EXTRA and size.starts == 1
    long = size_of(planned, hours=100.0)
    assert long.seconds == 24 * HOUR and long.starts == 6  # 120 hours, 23.5 at a time


def test_a_node_has_memory_for_its_processes_and_their_part_of_a_checkpoint(planned: Plan) -> None:
    parameters = planned.heaviest.parameters
    least = 8 * (8e9 + 16 * parameters / planned.data)
    assert least / 1e9 <= size_of(planned).memory_gb <= least / 1e9 + 1


@pytest.mark.parametrize(
    ("per_node", "word"), [(6, "do not spread evenly"), (1, "parallel.tensor=2")]
)
def test_a_layout_that_nodes_cannot_hold_is_refused(per_node: int, word: str) -> None:
    split = load_config(XL, ["parallel.tensor=2"])
    with pytest.raises(ConfigError, match=word):
        size_of(plan(split, 32, vocab_size=50257, block_length=1024), per_node=per_node)


def test_a_time_too_short_to_train_is_refused(planned: Plan) -> None:
    with pytest.raises(ConfigError, match="--longest"):
        size_of(planned, longest=0.4)


def test_the_job_file_says_what_was_planned(tmp_path: Path) -> None:
    size = JobSize(
        nodes=4, tasks_per_node=8, memory_gb=70, seconds=5430 * 60, starts=30, run_seconds=9e6
    )
    text = render(
        tmp_path / "a b/submissions/1",
        tmp_path / "a b",
        size,
        name="run",
        python="/usr/bin/python3",
        cpus_per_task=6,
        on_cpu=False,
        launcher="torchrun",
        directives=["--account=NAME"],
        working_directory=tmp_path,
    )
    lines = text.splitlines()
    for flag in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--mem=70G"):
        assert f"#SBATCH {flag}" in lines
    assert "#SBATCH --time=90:30:00" in lines and "#SBATCH --account=NAME" in lines
    assert "#SBATCH --signal=USR1@300" in lines
    assert "export SEDD_MAX_RESTARTS=${SEDD_MAX_RESTARTS:-90}" in lines
    cpu = replace(size, seconds=600)
    text = render(
        tmp_path,
        tmp_path,
        cpu,
        name="run",
        python="python3",
        cpus_per_task=1,
        on_cpu=True,
        launcher="srun",
        working_directory=tmp_path,
    )
    assert "gpus" not in text and "#SBATCH --signal=USR1@150" in text.splitlines()


def test_a_submission_keeps_code_and_configuration(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = load_config(XL, ["training.steps=7"])
    first = next_folder(run_dir)
    snapshot(first, config)
    assert load_config(first / "config.yaml") == config
    for name in ("commands/train.py", "slurm/launch.sh", "configs/runs/tiny.yaml"):
        assert (first / "code/sedd_scale" / name).read_bytes() == (PACKAGE / name).read_bytes()
    assert not list((first / "code").rglob("__pycache__"))
    assert next_folder(run_dir) == run_dir / "submissions/2"
    for number in (10, 9):
        (run_dir / f"submissions/{number}").mkdir()
        (run_dir / f"submissions/{number}/job").write_text(f"{100 + number}\n")
    assert submitted_jobs(run_dir) == ["109", "110"]
    assert next_folder(run_dir).name == "11"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--gpus=4"], "a rank needs"),
        (["--cpu"], "--gpus N"),
        (["--sbatch=account"], "--sbatch"),
        (["--gpus=24"], "training.global_batch"),
    ],
)
def test_submit_refuses_by_name(
    words: list[str], fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(XL), "--run-dir", str(tmp_path / "run"), "--vocab-size=50257", "--dry-run"]
    overrides = (
        ["parallel.recompute_every=0", "training.micro_batch=64"] if fault == "a rank needs" else []
    )
    assert main(["submit", *common, *words, *overrides]) == 2
    error = capsys.readouterr().err
    assert fault in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_status_of_what_was_never_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "status", str(tmp_path / "gone")]) == 2
    assert main(["submit", "status", str(tmp_path)]) == 2
    gone, never = capsys.readouterr().err.splitlines()
    assert "no run directory" in gone and "never submitted" in never


def test_the_default_configuration_has_a_plan() -> None:
    assert plan(Config(), 1, vocab_size=257, block_length=64).gpus == 1
