"""The same evaluation by 1, 2 and 3 processes, by tensor parallelism, and in several goes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.commands.eval_ppl import build_parser, evaluate
from tests.data.corpus import make_texts, write_jsonl
from tests.distributed.runs import launch
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import ROOT
from tests.tolerance import NETWORK

WORKER = ROOT / "tests/evaluation/eval_worker.py"
FEW = ("--max-blocks", "7", "--batch-size", "6")
COMMANDS = {
    "low-variance": (*FEW, "--draws", "4"),
    "paper": (*FEW, "--protocol", "paper", "--draws", "9"),
    "uniform, padded": (*FEW, "--draws", "4", "--documents", "rows", "--no-wrap"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_checkpoint(folder / "absorb")
    write_checkpoint(folder / "uniform", graph="uniform")
    write_jsonl(folder / "texts.jsonl", make_texts(12))
    return folder


def words(work: Path, name: str, *more: str) -> list[str]:
    checkpoint = work / ("uniform" if "uniform" in name else "absorb")
    data = ("--data", str(work / "texts.jsonl"))
    return ["--checkpoint", str(checkpoint), *data, *COMMANDS[name], *more]


def report(*arguments: str) -> dict[str, Any]:
    found = evaluate(build_parser().parse_args(arguments))
    assert found is not None
    return found


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "seconds"}


def test_any_number_of_processes_gives_the_same_digits(work: Path) -> None:
    """All keys but the seconds, of both protocols; shares of a tensor-parallel pair add up too."""
    commands = [words(work, name) for name in COMMANDS]
    alone = json.loads(json.dumps([report(*command) for command in commands]))
    tensor = ("--tensor", "2", "--resume", str(work / "pair"))
    found = {}
    for processes in (2, 3):
        given = commands + ([words(work, "low-variance", *tensor)] if processes == 2 else [])
        (work / "commands.json").write_text(json.dumps(given))
        reports = work / f"reports-{processes}.json"
        launch(processes, [str(WORKER), str(work / "commands.json"), str(reports)])
        found[processes] = json.loads(reports.read_text())
        for one, other in zip(alone, found[processes], strict=False):
            assert without_seconds(other) == without_seconds(one), processes
    pair = found[2][3]
    for key, value in alone[0].items():
        if isinstance(value, float) and key != "seconds":
            assert pair[key] == pytest.approx(value, rel=NETWORK), key
    # One of the pair kept the groups, for both.
    assert [path.name for path in (work / "pair").glob("*.jsonl")] == ["groups-0.jsonl"]
    assert alone[0]["nats_per_token"] != alone[1]["nats_per_token"]


def test_a_killed_evaluation_goes_on_and_ends_the_same(work: Path) -> None:
    """Killed in the middle of many small groups; what was finished is not made again."""
    name, kept = "low-variance", work / "kept"
    many = ("--max-blocks", "60", "--draws", "8", "--seed", "5")
    expected = report(*words(work, name, *many))
    command = [sys.executable, "-m", "sedd_scale", "eval_ppl", *words(work, name, *many)]
    child = subprocess.Popen(
        [*command, "--resume", str(kept)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    file = kept / "groups-0.jsonl"
    while not file.is_file() or file.read_bytes().count(b"\n") < 5:
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    *finished, last = filter(None, file.read_bytes().split(b"\n"))
    assert 4 <= len(finished) < expected["blocks"] - 1
    # As if it had died within a line.
    file.write_bytes(b"\n".join([*finished, last[: len(last) // 2]]))
    again = report(*words(work, name, *many, "--resume", str(kept)))
    assert without_seconds(again) == without_seconds(expected)
    lines = [line for line in file.read_bytes().splitlines() if line.startswith(b"{")]
    assert len(lines) == expected["blocks"] + 1, "some were made twice"  # one was cut
    assert (
        file.stat().st_size > 0
        and report(*words(work, name, *many, "--resume", str(kept)))["nats_per_token"]
        == expected["nats_per_token"]
    )
