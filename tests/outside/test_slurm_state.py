"""What a cluster leaves behind: torn state, tasks of arrays, shards without work."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.__main__ import main
from sedd_scale.checkpoint.directory import find_checkpoint, warn_once
from sedd_scale.checkpoint.manifest import write_manifest
from sedd_scale.cluster.merge_samples import merge_samples
from sedd_scale.cluster.restarts import progress_of, read_ledger
from sedd_scale.errors import DataError
from sedd_scale.files.package import environment_for
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with whole checkpoints of steps 5 and 10."""
    run = write_checkpoint(tmp_path_factory.mktemp("made") / "run")
    first = run / "checkpoints/step-0"
    for step in (5, 10):
        copy = run / f"checkpoints/step-{step}"
        shutil.copytree(first, copy)
        meta = json.loads((copy / "meta.json").read_text())
        (copy / "meta.json").write_text(json.dumps({**meta, "step": step}))
        write_manifest(copy, {})
    shutil.rmtree(first)
    (run / "checkpoints/latest").write_text("step-10\n")
    (run / "slurm").mkdir()
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def rewritten(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "latest").write_bytes(content) and None


def unlinked(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def half(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def linked(target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "latest").unlink()
        (folder / "latest").symlink_to(target)

    return change


def replaced(folder: Path) -> None:
    """A crash between the two renames of a step that is written again."""
    (folder / "step-10").rename(folder / "step-10.old")
    (folder / "step-10.tmp").mkdir()


# What a crash, a full disk or a hand did, and the step that training goes on from.
TORN: dict[str, tuple[Callable[[Path], None], int]] = {
    "latest is empty": (rewritten(b""), 10),
    "latest has zeros at its end": (rewritten(b"step-7\0\0"), 10),
    "latest is cut short": (rewritten(b"ste"), 10),
    "latest is missing": (unlinked("latest"), 10),
    "latest names what is gone": (rewritten(b"step-15\n"), 10),
    "latest names an older one": (rewritten(b"step-5\n"), 5),
    "latest ends as on Windows": (rewritten(b"step-5\r\n"), 5),
    "latest is a link": (linked("step-5"), 5),
    "latest is a link to what is gone": (linked("step-15"), 10),
    "the newest has no index": (unlinked("step-10/.metadata"), 5),
    "the newest has no description": (unlinked("step-10/meta.json"), 5),
    "the newest has no manifest": (unlinked("step-10/manifest.json"), 5),
    "the newest lacks its weights": (unlinked("step-10/__0_0.distcp"), 5),
    "the newest is cut short": (half("step-10/__0_0.distcp"), 5),
    "the newest's description is cut short": (half("step-10/meta.json"), 5),
    "the newest is empty": (
        lambda folder: (
            [path.unlink() for path in (folder / "step-10").rglob("*") if path.is_file()] and None
        ),
        5,
    ),
    "the newest was being replaced": (replaced, 10),
}


@pytest.mark.parametrize("torn", TORN)
def test_torn_state_stops_no_job(
    run: Path, torn: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, step = TORN[torn]
    change(run / "checkpoints")
    assert progress_of(run) == step
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    from sedd_scale.cluster import restarts

    ledger = run / "slurm/attempts-1.jsonl"
    monkeypatch.setattr(sys, "argv", ["restarts", "begin", str(ledger), "--progress", str(run)])
    assert restarts.main() == 0
    assert read_ledger(ledger)[-1]["progress"] == step
    assert main(["submit", "status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saved_step"] == step
    warn_once.cache_clear()
    found = find_checkpoint(run)
    assert found.name.removesuffix(".old") == f"step-{step}"
    warned = "is read instead" in capsys.readouterr().err
    assert warned == (
        torn
        not in (
            "latest names an older one",
            "latest ends as on Windows",
            "latest is a link",
            "the newest was being replaced",
        )
    )
    assert main(["convert_ckpt", "inspect", str(run)]) == 0
    assert f"step        {step}, " in capsys.readouterr().out


def test_training_goes_on_where_the_commands_say(run: Path, tmp_path: Path) -> None:
    """The same step, by the state that the loop itself loads."""
    from sedd_scale.checkpoint.directory import newest_whole, resume_candidates

    for change, step in TORN.values():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(run, tmp_path / "copy")
        change(tmp_path / "copy/checkpoints")
        candidates = [path.name for path in resume_candidates(tmp_path / "copy")[0]]
        path, meta, _ = newest_whole(tmp_path / "copy")
        assert meta["step"] == step and path.name in candidates


def test_status_of_a_run_whose_files_are_cut_short(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "slurm/attempts-7.jsonl").write_text('{"event": "begin", "restart": 0, "progr')
    (run / "config.yaml").write_text("training: {steps")
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "lo\0\0\0')
    (run / "submissions/1").mkdir(parents=True)
    (run / "submissions/1/job").write_text("")
    assert main(["submit", "status", str(run)]) == 0
    assert "job         7" in capsys.readouterr().out


def test_a_line_behind_one_cut_short_is_kept(run: Path) -> None:
    ledger = run / "slurm/attempts-1.jsonl"
    ledger.write_text('{"event": "begin", "rest')
    assert restart("begin", ledger, run, SLURM_JOB_ID="1").returncode == 0
    assert [line["event"] for line in read_ledger(ledger)] == ["begin"]


def restart(
    action: str, ledger: Path, progress: Path, *words: str, scontrol: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run restarts in a process of its own, with a stand-in for scontrol."""
    programs = ledger.parent / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
    (programs / "scontrol").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    return subprocess.run(
        [
            *(sys.executable, "-m", "sedd_scale.cluster.restarts", action, str(ledger)),
            *("--progress", str(progress), *words),
        ],
        env={**environment_for(os.environ), "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def line_of(job: int, task: int, state: str) -> str:
    return (
        f"JobId={job} ArrayJobId=100 ArrayTaskId={task} JobState={state} Reason=None "
        "ExcNodeList=(null)"
    )


ARRAY = [line_of(100, 1, "RUNNING"), line_of(101, 0, "COMPLETED")]


@pytest.mark.parametrize(
    ("job", "lines", "verdict"),
    [
        ("100", ARRAY, "requeue"),
        ("100", ARRAY[::-1], "requeue"),
        ("101", ARRAY, "stop"),
        ("100", [line_of(100, 1, "CANCELLED"), line_of(101, 0, "RUNNING")], "stop"),
        ("100", [line_of(102, 2, "PENDING"), line_of(100, 1, "RUNNING")], "requeue"),
    ],
    ids=["last task", "other order", "a finished task", "a cancelled task", "one waits"],
)
def test_a_task_of_an_array_asks_for_itself(
    job: str, lines: list[str], verdict: str, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.touch()
    said = f"printf '%s\\n' {' '.join(repr(line) for line in lines)}"
    array = {"SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "1"}
    ended = restart(
        *("end", tmp_path / "ledger.jsonl", output, "--code", "75"),
        scontrol=said,
        SLURM_JOB_ID=job,
        **array,
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, verdict)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        # A controller that is away comes back: launch.sh waits for it.
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "requeue"),
        ("scontrol: fatal: Could not establish a configuration source", "stop"),
        ("slurm_load_jobs error: Invalid job id specified", "stop"),
    ],
)
def test_an_end_without_an_answer_takes_seconds(said: str, verdict: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.touch()
    before = time.monotonic()
    ended = restart(
        *("end", tmp_path / "ledger.jsonl", output, "--code", "75"),
        scontrol=f"echo '{said}' >&2; exit 1",
        SLURM_JOB_ID="7",
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, verdict)
    assert time.monotonic() - before < 30


LAUNCH = """
set -euo pipefail
. slurm/launch.sh
sedd_environment
sedd_requeue 75 node3
"""


@pytest.mark.parametrize("away", [False, True], ids=["at once", "when the controller is back"])
def test_only_the_task_is_requeued(away: bool, tmp_path: Path) -> None:
    """By the script itself, beside a scontrol that notes what it is asked."""
    programs, asked = tmp_path / "programs", tmp_path / "asked"
    programs.mkdir()
    refuses = (
        f'[ -e {tmp_path}/asked ] || {{ echo "Unable to contact" >&2; touch {asked}; exit 1; }}'
    )
    (programs / "scontrol").write_text(
        "#!/bin/sh\nif [ $2 = hostnames ]; then echo node0; exit; fi\n"
        f'{refuses if away else ""}\necho "$*" >>{asked}\n'
    )
    (programs / "scontrol").chmod(0o755)
    (programs / "sleep").symlink_to("/bin/true")
    environment = {
        **{"SLURM_JOB_ID": "100", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "1"},
        **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "node0", "MASTER_PORT": "15000"},
        **{"SLURM_TASKS_PER_NODE": "1", "SEDD_PYTHON": sys.executable},
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-c", LAUNCH], cwd=ROOT, env={**os.environ, **environment}, capture_output=True
    )
    assert done.returncode == 75, done.stderr
    found = asked.read_text().splitlines()
    assert found == ["requeue 100_1", "update JobId=100_1 ExcNodeList=node3"]


def draw(run: Path, output: Path, *words: str) -> int:
    steps = ["--steps", "2", "--batch-size", "1", "--output", str(output)]
    return main(["generate", "--checkpoint", str(run), *words, *steps])


def samples(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: record[key] for key in record if key != "seconds"} for record in records]


def test_shards_of_prompts_with_words_for_ids_join_without_the_prompts(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {"id": "zebra", "text": "It was [blank:3] x"},
        {"id": "ant", "text": "He is [blank:9] x", "num_samples": 2},
        {"id": 7, "prefix": "a", "seed": 3},
        {"id": "b", "prefix": "a", "seed": 3, "steps": 3},
    ]
    prompts, output, whole = (tmp_path / name for name in ("p.jsonl", "s.jsonl", "one.jsonl"))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw(made, whole, f"--prompts={prompts}") == 0
    for shard in range(8):  # more than there are batches
        part = tmp_path / f"s.shard-{shard}-of-8.jsonl"
        assert not merge_samples(output, 8)
        assert draw(made, part, f"--prompts={prompts}", "--shard", f"{shard}/8") == 0
        assert part.exists()
    assert merge_samples(output, 8)
    assert samples(output) == samples(whole) and len(samples(whole)) == 5
    assert not list(tmp_path.glob("s.shard*"))


def test_shards_of_an_older_version_join_in_the_order_they_have(tmp_path: Path) -> None:
    output = tmp_path / "s.jsonl"
    for shard, ids in enumerate((["b", "a"], ["c"])):
        part = tmp_path / f"s.shard-{shard}-of-2.jsonl"
        part.write_text("".join(json.dumps({"id": name}) + "\n" for name in ids))
    assert merge_samples(output, 2)
    assert [record["id"] for record in samples(output)] == ["b", "a", "c"]


def test_a_damaged_shard_is_named_and_kept(tmp_path: Path) -> None:
    part = tmp_path / "s.shard-0-of-1.jsonl"
    part.write_text('{"id": "a"}\n{"id": "b')
    with pytest.raises(DataError, match=r"s\.shard-0-of-1\.jsonl:2 is no sample"):
        merge_samples(tmp_path / "s.jsonl", 1)
    assert [path.name for path in tmp_path.iterdir()] == [part.name]
