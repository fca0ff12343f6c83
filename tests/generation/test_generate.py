"""The command: records in order, prompts kept, nothing written over."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_scale.__main__ import main
from sedd_scale.generation.quality import token_entropy
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import ROOT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("generate") / "run", block_length=12)


def run(checkpoint: Path, output: Path, *arguments: object) -> int:
    chosen = ["--checkpoint", str(checkpoint), "--output", str(output), "--steps", "5"]
    return main(["generate", *chosen, *map(str, arguments)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**record, "seconds": 0} for record in records]


def test_unconditional_samples_do_not_depend_on_the_batch(checkpoint: Path, tmp_path: Path) -> None:
    for size in (2, 5):
        output = tmp_path / f"{size}.jsonl"
        assert run(checkpoint, output, "--num-samples", 5, "--seed", 3, "--batch-size", size) == 0
    records = read(tmp_path / "5.jsonl")
    assert same(records) == same(read(tmp_path / "2.jsonl"))
    assert [record["id"] for record in records] == [0, 1, 2, 3, 4]
    for record in records:
        assert len(record["tokens"]) == record["length"] == 12
        assert max(record["tokens"]) < 257
        assert record["entropy"] == pytest.approx(token_entropy(np.array(record["tokens"])))
        assert record["seed"] == 3
        assert (record["settings"]["steps"], record["settings"]["sampler"]) == (5, "analytic")
    assert len({tuple(record["tokens"]) for record in records}) == 5


def test_prompts_are_kept_and_answered_in_order(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"id": "a", "text": "ab[blank:3]cd", "num_samples": 2},
        {"id": "b", "prefix": "xy", "suffix": "z"},
        {"id": "c", "text": "ab[blank:3]cd", "seed": 8},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(checkpoint, tmp_path / "all.jsonl", "--prompts", prompts) == 0
    records = read(tmp_path / "all.jsonl")
    assert [record["id"] for record in records] == ["a-0", "a-1", "b", "c"]
    for record in (records[0], records[1], records[3]):
        assert record["length"] == 7
        assert bytes(record["tokens"][:2]) == b"ab" and bytes(record["tokens"][5:]) == b"cd"
    assert records[2]["length"] == 12 and records[2]["text"].startswith("xy")
    assert records[2]["tokens"][-1] == ord("z")
    assert records[0]["tokens"] != records[1]["tokens"]
    # A prompt with its own seed does not depend on what stands before it.
    prompts.write_text(json.dumps(lines[2]) + "\n")
    assert run(checkpoint, tmp_path / "one.jsonl", "--prompts", prompts) == 0
    assert same(read(tmp_path / "one.jsonl")) == same(records[3:])


def test_a_killed_command_goes_on_without_a_gap(checkpoint: Path, tmp_path: Path) -> None:
    asked = ("--num-samples", 60, "--seed", 3, "--batch-size", 2, "--steps", 40)
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    words = ["-m", "sedd_scale", "generate", "--checkpoint", checkpoint, "--output", killed, *asked]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )

    def finished() -> list[bytes]:
        parts = Path(f"{killed}.parts").glob("*.jsonl")
        return [line for part in parts for line in part.read_bytes().splitlines()]

    while len(finished()) < 6:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = finished()
    assert len(before) < 60 and not killed.exists()
    assert run(checkpoint, killed, *asked) == run(checkpoint, whole, *asked) == 0
    assert same(read(killed)) == same(read(whole))
    # What had been drawn was not drawn again: its seconds are those of the killed process.
    drawn = {sample["id"]: sample for sample in read(killed)}
    for line in before[:-2]:  # the last batch may be cut short
        sample = json.loads(line)
        assert drawn[sample["id"]]["seconds"] == sample["seconds"]


def test_bad_input_is_one_line_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a____"}\n{"text": "abcdefghijklmnop____"}\n')
    (tmp_path / "there.jsonl").write_text("kept")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a____"}\n{"text":\n')
    (tmp_path / "id.jsonl").write_text('{"tokens": [257], "positions": [0]}\n')
    for output, arguments, message in [
        ("there.jsonl", (), "exists already"),
        ("no/where.jsonl", (), "there is no directory"),
        ("new.jsonl", ("--trace", tmp_path / "new.jsonl"), "is written already"),
        ("new.jsonl", ("--trace", tmp_path / "new.report.json"), "is written already"),
        ("new.jsonl", ("--prompts", prompts), "prompts.jsonl:2: the prompt needs 16 tokens"),
        ("new.jsonl", ("--prompts", prompts, "--num-samples", 2), "does not go with"),
        ("new.jsonl", ("--temperature", -1), "temperature=-1"),
        ("new.jsonl", ("--on-bad-prompt", "skip"), "goes with --prompts"),
        ("new.jsonl", ("--trace-samples", 2), "goes with --trace"),
        ("new.jsonl", ("--prompts", tmp_path / "empty.jsonl"), "is empty"),
        ("new.jsonl", ("--prompts", tmp_path / "bad.jsonl"), "bad.jsonl:2 is not JSON"),
        ("new.jsonl", ("--prompts", tmp_path / "id.jsonl"), "id.jsonl:1: token id 257"),
        ("new.jsonl", ("--judge", tmp_path / "none"), "does not exist"),
    ]:
        assert run(checkpoint, tmp_path / output, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert (tmp_path / "there.jsonl").read_text() == "kept"
    assert not list(tmp_path.glob("*.parts"))
    assert not (tmp_path / "new.jsonl").exists()


def test_a_bad_line_is_passed_over_where_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a____"}\n{\n{"text": "abcdefghijklmnop____"}\n{"prefix": "b"}\n')
    skip = ("--prompts", prompts, "--on-bad-prompt", "skip")
    assert run(checkpoint, tmp_path / "out.jsonl", *skip) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(told) == 2 and ":2 is not JSON" in told[0] and ":3: the prompt needs" in told[1]
    assert [record["id"] for record in read(tmp_path / "out.jsonl")] == [1, 4]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["samples"], report["prompts_skipped"]) == (2, 2)


def test_traces_replay_to_their_samples_and_are_shown(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, page = tmp_path / "out.jsonl", tmp_path / "out.html"
    traced = ("--num-samples", 3, "--trace", page, "--trace-samples", 2, "--batch-size", 3)
    assert run(checkpoint, output, *traced) == 0
    records = read(output)
    assert ["trace" in record for record in records] == [True, True, False]
    for record in records[:2]:
        tokens: list[int | None] = [None] * record["length"]
        for event in record["trace"]["events"]:
            for position, token in zip(event["positions"], event["tokens"]):
                tokens[position] = token
        assert tokens == record["tokens"]
    assert page.read_text().startswith("<!DOCTYPE html>")
    capsys.readouterr()
    show = [str(output), "--show-trace", "--id", "1"]
    assert main(["samples", *show]) == 0
    assert "--- sample 1: start, time 1" in capsys.readouterr().out
    show[-1] = "9"
    assert main(["samples", *show]) == 2
    assert "no sample with the id 9" in capsys.readouterr().err
