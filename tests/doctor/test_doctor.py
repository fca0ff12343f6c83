"""The doctor: what works is called so after it was tried, what is broken is named with a fix."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sedd_scale.doctor import installation, machine
from sedd_scale.doctor.findings import BAD, GOOD, NOTICE, OPTIONAL, Finding, verdict
from sedd_scale.doctor.processes import run_trial, run_trials, trial_environment
from tests.repository import ROOT


def doctor(*words: str, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "sedd_scale", "doctor", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_two_processes_add_up_and_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As under a launcher, whose place among others the trials do not take."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert not {"WORLD_SIZE", "RANK", "SLURM_JOB_ID"} & {*trial_environment()}
    summed = machine.try_all_reduce("gloo", 2)
    assert summed.verdict == GOOD and summed.detail.startswith("2 processes: 4.2 MB in")
    trained = machine.try_training()
    assert trained.verdict == GOOD and "step-1 saved" in trained.detail, trained
    assert not list(tmp_path.glob("sedd-doctor-*"))


def test_the_whole_examination():
    code, lines = doctor("--json")
    found = json.loads(lines[-1])
    assert code == 0 and found["ready"]
    names = {finding["name"] for finding in found["findings"]}
    assert {"torch", "CUDA", "NCCL", "gloo", "flash-attn", "triton", "wandb", "Slurm"} <= names
    assert {"Python", "deepspeed", "megatron-core", "disk", "memory", "training step"} <= names


def test_a_broken_torch_is_named_with_its_fix_and_told_by_the_exit_code(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    code, lines = doctor(PYTHONPATH=str(tmp_path))
    assert code == 1 and lines[-1].startswith("not ready: mend ")
    (place,) = [number for number, line in enumerate(lines) if line.startswith("torch ")]
    said = " ".join(lines[place : place + 3])  # folded to the width of a terminal
    assert "FAIL" in lines[place] and "libcudart" in said
    assert "pip install --force-reinstall" in " ".join(said.split())
    assert any(line.startswith("training step") and "not tried" in line for line in lines)


def test_a_package_that_takes_its_process_along_is_the_one_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "first.py").write_text("")
    (tmp_path / "fatal.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "last.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = installation.import_failures(["first", "fatal", "last"])
    assert found == {
        "fatal": "importing it was ended by SIGSEGV",
        "last": "ModuleNotFoundError: No module named 'nothing_of_this_name'",
    }


def test_trials_that_hang_are_ended_together():
    begun = time.monotonic()
    with_store = ["all_reduce", "gloo", "0", "2", "/dev/null/nowhere"]
    ((said, why), (_, unknown)) = run_trials([with_store, ["unknown"]], seconds=0.2)
    assert not said and why == "took longer than 0 s" and unknown is not None
    assert time.monotonic() - begun < 5


def test_a_trial_that_fails_says_why():
    assert run_trial("unknown") == ([], "failed: ValueError: unknown")


def test_what_is_required_is_what_setup_asks_for():
    needed = installation.requirements()
    assert needed is not None and str(needed["megatron-core"].specifier) == "==0.16.1"
    assert {"torch", "deepspeed", "wandb", "rich"} <= {*needed}
    assert not {"pytest", "flash-attn"} & {*needed}  # of extras


def test_verdicts_on_packages():
    judge, torch = installation.judge_required, Requirement("torch>=2.11,<2.14")
    assert judge(torch, "2.13.0+cpu", None).verdict == GOOD
    assert judge(torch, "2.10.0", None).verdict == NOTICE
    assert judge(Requirement("deepspeed==0.19.8"), "0.19.9", None).verdict == BAD
    assert judge(torch, "2.13.0", "ImportError: gone").verdict == BAD
    missing = judge(torch, None, None)
    assert missing.verdict == BAD and missing.fix is not None
    assert missing.fix.endswith("-m pip install 'torch<2.14,>=2.11'")
    optional = installation.judge_optional("flash-attn", "flash", "speed", None, None)
    assert optional.verdict == OPTIONAL and "[flash]'" in (optional.fix or "")


def gpus(**found: object) -> dict[str, object]:
    return {
        "built_for": "13.0",
        "names": ["NVIDIA H100"] * 2,
        "memory_gb": 80.0,
        "bf16": True,
        "nccl": "2.28.3",
        "has_nccl": True,
        "has_gloo": True,
        "threads": 8,
        "device_free_share": 1.0,
        **found,
    }


def test_verdicts_on_devices():
    assert machine.judge_cuda(gpus()).verdict == GOOD
    assert machine.judge_nccl(gpus()).detail == "2.28.3"
    assert machine.judge_cuda(gpus(device_free_share=0.3)).verdict == NOTICE
    assert machine.judge_cuda(gpus(device_error="GPU 1: lost")).verdict == BAD
    assert machine.judge_cuda(gpus(names=[])).verdict == NOTICE
    assert machine.judge_nccl(gpus(has_nccl=False)).verdict == BAD
    assert machine.judge_nccl(gpus(has_nccl=False, names=[])).verdict == OPTIONAL
    assert machine.judge_gloo(gpus(has_gloo=False)).verdict == BAD


def test_verdicts_on_the_compiler():
    assert machine.judge_compiler(None, on_gpu=True).verdict == GOOD
    missing = "no C compiler (gcc): install gcc"
    assert machine.judge_compiler(missing, on_gpu=True).verdict == BAD
    assert machine.judge_compiler(missing, on_gpu=False).verdict == OPTIONAL


def test_the_last_line():
    assert verdict([Finding("a", GOOD, ""), Finding("b", OPTIONAL, "")]) == "ready"
    assert verdict([Finding("a", NOTICE, "")]) == "ready; look at a"
    assert verdict([Finding("a", BAD, ""), Finding("b", NOTICE, "")]).startswith(
        "not ready: mend a"
    )
