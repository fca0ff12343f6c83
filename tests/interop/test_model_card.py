"""An export ready to be pushed: its card says what the run's files do, its weights are equal."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from sedd_scale.__main__ import main
from sedd_scale.interop.checkpoint_source import Description
from sedd_scale.interop.convert import convert
from sedd_scale.interop.fingerprint import checkpoint_fingerprint
from sedd_scale.interop.native import write_native_run
from sedd_scale.interop.sedd_directory import published_shapes
from tests.evaluation.enumeration import tiny_model
from tests.interop.test_convert import Shifted

VALIDATIONS = [(5, 3.25, 0.5), (10, 2.5, 0.125), (15, 1.0, 0.25)]


class Trained(Shifted):
    """A run's averages and weights at step 12."""

    def __init__(self) -> None:
        super().__init__(tiny_model("absorb", "loglinear"))
        config = self.described.config.override("data.path=/somewhere/books", "optimizer.lr=0.003")
        self.described = Description(config, 2, step=12, optimizer_step=12, tokens=12_345)


def run(*arguments: object) -> int:
    return main(["convert_ckpt", *map(str, arguments)])


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run whose checkpoint is older than its last validation, and an evaluation of it."""
    folder = tmp_path / "run"
    write_native_run(Trained(), folder)
    lines = [
        {"step": step, "valid_nats_per_token": nats, "valid_stderr": error}
        for step, nats, error in VALIDATIONS
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {
        "kind": "bound",
        "nats_per_token": 2.375,
        "stderr": 0.0625,
        "perplexity": math.exp(2.375),
        "protocol": "low-variance",
        "blocks": 96,
        "data": "texts/held-out.txt",
        "dataset": None,
        "weights": "ema",
        "checkpoint": "run",
        "checkpoint_fingerprint": checkpoint_fingerprint(folder),
    }
    (tmp_path / "bound.txt").write_text(f"a table\n{json.dumps(report)}\n")
    return folder


def test_numbers_of_the_card_are_those_of_the_run(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    command = ["--from", "native", "--to", "sedd-hf", "--results", tmp_path / "bound.txt"]
    assert run(*command, trained, target) == 0
    card = (target / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    values = [result["metrics"][0]["value"] for result in front["model-index"][0]["results"]]
    # The validation after the checkpoint's step is of other weights.
    assert values == [math.exp(2.5), math.exp(2.375)]
    assert "2.5000 ± 0.1250" in card and "2.3750 ± 0.0625" in card
    assert "1.0000" not in card and "step 10" in card
    assert "| data | books |" in card and "/somewhere" not in card
    assert "12,345" in card and "lr 0.003" in card
    assert 'load_pretrained("exported")' in card and "load_model" in card
    parsed = ModelCard.load(target / "README.md")
    assert parsed.data.library_name == "sedd_scale"
    assert [result.metric_value for result in parsed.data.eval_results or ()] == values


def test_what_is_pushed_comes_back_bit_for_bit(trained: Path, tmp_path: Path) -> None:
    convert("native", "sedd-hf", trained, tmp_path / "first")
    convert("sedd-hf", "native", tmp_path / "first", tmp_path / "again")
    convert("native", "sedd-hf", tmp_path / "again", tmp_path / "second")
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The names and shapes that the authors' module registers, and its buffer.
    shapes = published_shapes(Trained().described.config)
    assert first.keys() == shapes.keys() | {"rotary_emb.inv_freq"}
    assert all(tuple(first[name].shape) == shape for name, shape in shapes.items())
    config = json.loads((tmp_path / "first/config.json").read_text())
    assert config["noise"]["type"] == "loglinear" and config["graph"]["type"] == "absorb"


def test_numbers_of_other_weights_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--from", "native", "--to", "sedd-hf", "--results", tmp_path / "bound.txt"]
    assert run(*command, "--weights", "master", trained, tmp_path / "last") == 2
    assert "other weights" in capsys.readouterr().err
    assert run(*command[:4], "--weights", "master", trained, tmp_path / "last") == 0
    assert "Nothing was measured" in (tmp_path / "last/README.md").read_text()
    report = json.loads((tmp_path / "bound.txt").read_text().splitlines()[-1])
    report["checkpoint_fingerprint"] = "0" * 64
    (tmp_path / "bound.txt").write_text(json.dumps(report))
    assert run(*command, trained, tmp_path / "other") == 2
    assert "other weights" in capsys.readouterr().err
    (tmp_path / "bound.txt").write_text("no report")
    assert run(*command, trained, tmp_path / "other") == 2
    assert "is not a report" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
