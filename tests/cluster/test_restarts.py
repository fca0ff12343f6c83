"""When a job goes on, when it gives up, and what it says of it."""

import json
from pathlib import Path
from typing import Any

from sedd_scale.checkpoint.directory import FORMAT, FORMAT_VERSION, META_KEYS
from sedd_scale.checkpoint.manifest import write_manifest
from sedd_scale.cluster.restarts import count_stalled, judge, progress_of, read_ledger


def begin(restart: int, progress: int) -> dict[str, Any]:
    return {"event": "begin", "restart": restart, "progress": progress}


def end(restart: int, progress: int, *bad_nodes: str) -> dict[str, Any]:
    return {
        "event": "end",
        "restart": restart,
        "progress": progress,
        "code": 3 if bad_nodes else 75,
        "bad_nodes": list(bad_nodes),
    }


def step_directory(path: Path, step: int) -> None:
    """What tells a checkpoint's step: its description and its manifest."""
    path.mkdir(parents=True)
    meta = dict.fromkeys((*META_KEYS, "optimizer_step", "versions", "shapes"))
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step}
    (path / "meta.json").write_text(json.dumps({**meta, **about}))
    (path / ".metadata").touch()
    write_manifest(path, {})


def verdict(lines: list[dict[str, Any]], progress: int, restarts: int) -> Any:
    return judge(lines, progress=progress, restarts=restarts, max_restarts=5, max_stalled=2)


def test_progress_is_followed_by_a_requeue() -> None:
    found = verdict([begin(0, 0), end(0, 10), begin(1, 10), end(1, 20)], 20, restarts=1)
    assert found.requeue and found.exclude == ()


def test_starts_without_progress_are_counted_to_the_last_that_had_some() -> None:
    lines = [begin(0, 0), end(0, 10), begin(1, 10), end(1, 10), begin(2, 10)]
    assert count_stalled(lines, 10) == 2
    assert count_stalled(lines, 11) == 0
    assert count_stalled(lines[:3], 10) == 1
    assert not verdict(lines, 10, restarts=2).requeue
    assert "no progress in 2 starts" in verdict(lines, 10, restarts=2).reason


def test_a_start_that_slurm_cut_short_counts_like_any_other() -> None:
    assert count_stalled([begin(0, 5), begin(1, 5), begin(2, 5)], 5) == 3


def test_bad_nodes_are_left_out_and_do_not_count_as_a_fault_of_the_work() -> None:
    lines = [begin(0, 0), end(0, 0, "node1"), begin(1, 0), end(1, 0, "node3", "node2")]
    found = verdict(lines, 0, restarts=1)
    assert found.requeue and found.exclude == ("node1", "node2", "node3")


def test_the_number_of_restarts_is_limited() -> None:
    lines = [begin(number, number) for number in range(6)]
    assert verdict(lines, 6, restarts=4).requeue
    found = verdict(lines, 6, restarts=5)
    assert not found.requeue and "SEDD_MAX_RESTARTS" in found.reason


def test_progress_of_runs_and_outputs(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "samples.jsonl"
    assert progress_of(run) == progress_of(output) == 0
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/attempts-1.jsonl").write_text("{}\n")
    assert progress_of(run) == 0
    step_directory(run / "checkpoints/step-70", 70)
    (run / "checkpoints/latest").write_text("step-70\n")
    assert progress_of(run) == 70
    (tmp_path / "samples.jsonl.parts").mkdir()
    (tmp_path / "samples.jsonl.parts/0").write_bytes(b"abc")
    assert progress_of(output) == 3


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "attempts-1.jsonl"
    assert read_ledger(path) == []
    path.write_text(json.dumps(begin(0, 0)) + '\n{"event": "en')
    assert read_ledger(path) == [begin(0, 0)]
