"""The GPU benchmark, rehearsed on a CPU with tiny sizes: every part's command runs and reports."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sedd_scale.__main__ import main
from sedd_scale.benchmark import gpu
from sedd_scale.benchmark.gpu import Part, measured, parts, report


def kinds() -> list[Part]:
    """One of every kind of command; the models differ in size alone."""
    found: dict[str, Part] = {}
    for part in parts(rehearse=True):
        found.setdefault(part.name.partition(" of ")[0], part)
    return list(found.values())


@pytest.mark.parametrize("part", kinds(), ids=lambda part: part.name)
def test_every_part_runs_and_reports(part: Part, tmp_path: Path) -> None:
    result = measured(part, tmp_path, seconds=240)
    assert "error" not in result, result
    assert result["found"] and report([result]).count("\n") == 3
    if part.name.startswith("fp32 losses"):
        assert result["found"]["largest_difference"] < 1e-4
    if part.name.startswith("bf16 losses"):
        assert result["found"]["largest_difference"] < 0.02


def test_real_and_rehearsed_parts_are_the_same() -> None:
    real, tried = list(parts(rehearse=False)), list(parts(rehearse=True))
    assert [part.name for part in real] == [part.name for part in tried]
    assert real[0].name == "doctor" and sum(part.minutes for part in real) <= 30


def test_what_fails_or_takes_too_long_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-c"]
    planted = [
        Part("good", 1, [*program, "print('{\"seconds\": 1.5}')"]),
        Part("bad", 1, [*program, "import sys; sys.exit('no such kernel')"]),
        Part("slow", 0.02, [*program, "import time; time.sleep(60)"]),
        Part("last", 1, [*program, "print('{\"loss\": 2.5}')"]),
    ]
    monkeypatch.setattr(gpu, "parts", lambda rehearse: planted)
    output = tmp_path / "gpu"
    assert main(["benchmark", "gpu", "--minutes", "5", "--output", str(output), "--rehearse"]) == 2
    assert "2 parts failed (bad, slow)" in capsys.readouterr().err
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [result["part"] for result in results] == ["good", "bad", "slow", "last"]
    assert results[0]["found"] == {"seconds": 1.5} and results[3]["found"] == {"loss": 2.5}
    assert results[1]["error"] == "no such kernel" and "not done" in results[2]["error"]
    assert "| last | loss 2.5 |" in (output / "report.md").read_text()
    assert main(["benchmark", "gpu", "--minutes", "5", "--output", str(output), "--rehearse"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["benchmark", "gpu", "--minutes", "1", "--output", str(tmp_path / "o")]) == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "o").exists()
