"""Datasets, runs and exports that an earlier commit wrote are read, resumed and repeated."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.__main__ import main
from sedd_scale.files.package import environment_for
from tests.repository import ROOT

# A dataset of bytes, a run of six steps on two tensor-parallel processes whose checkpoint of step 3
# is kept, and what that commit (009d846) made of it: six steps of metrics, a bound, two samples and
# an export.
WRITTEN = ROOT / "tests/data/written/before_rooms.tar.xz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(WRITTEN) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(tmp_path, **safely)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_resumes_with_the_losses_it_had(folder: Path) -> None:
    # In a process of its own, which blocks signals at its end.
    words = ["train", "run/config.yaml", "--run-dir", "run", "parallel.tensor=1"]
    command = [sys.executable, "-m", "sedd_scale", *words]
    subprocess.run(command, env=environment_for(os.environ), check=True)
    before, after = lines(folder / "metrics.jsonl"), lines(folder / "run/metrics.jsonl")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for old, new in zip(before, after):
        for key in ("loss", "grad_norm", "valid_nats_per_token"):
            assert new.get(key) == (None if key not in old else pytest.approx(old[key], rel=1e-5))


def test_a_bound_and_samples_are_repeated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval_ppl", "--checkpoint", "run", "--data", "dataset", "--json"]) == 0
    found, before = json.loads(capsys.readouterr().out), json.loads(Path("bound.json").read_text())
    assert {*before} <= {*found}
    assert found["nats_per_token"] == pytest.approx(before["nats_per_token"], rel=1e-5)
    for key in ("data_fingerprint", "checkpoint_fingerprint", "tokens", "blocks"):
        assert found[key] == before[key]
    drawn = ["--num-samples", "2", "--length", "16", "--steps", "8", "--seed", "3"]
    assert main(["generate", "--checkpoint", "run", *drawn, "--output", "again.jsonl"]) == 0
    for old, new in zip(
        lines(folder / "samples.jsonl"), lines(folder / "again.jsonl"), strict=True
    ):
        assert (new["tokens"], new["settings"]) == (old["tokens"], old["settings"])


def test_an_export_is_the_run_it_was_made_of(folder: Path) -> None:
    assert main(["convert_ckpt", "verify", "run", "exported", "--tolerance", "0"]) == 0
    assert main(["prepare_data", "inspect", "dataset", "--num-blocks", "0"]) == 0
    assert main(["plot_run", "run", "--output", "page.html"]) == 0
