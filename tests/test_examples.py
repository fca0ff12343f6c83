"""The examples run, one after the other, and the Python API does what its docstrings say."""

import ast
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sedd_scale
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from tests.repository import ROOT

EXAMPLES = ROOT / "examples"
TEXT = "One morning the river was gone, and nobody could say where it went. " * 3


def run_example(name: str, *arguments: str) -> None:
    script = str(EXAMPLES / name)
    sys.argv[:] = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def test_the_examples_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text.txt").write_text(TEXT)
    run_example("train_from_scratch.py", "21")
    losses = [line for line in capsys.readouterr().out.splitlines() if "nats/token" in line]
    assert len(losses) == 1
    # An untrained model has ln 257 = 5.5 nats a token.
    assert float(losses[0].split()[2]) < 5.0
    run_example("sample_and_infill.py", "example-model")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("sample: ") for line in lines) == 2
    infilled = [line.removeprefix("infilled: ") for line in lines if "infilled: " in line]
    assert [ast.literal_eval(text)[:13] for text in infilled] == ["The value of "] * 2
    run_example("evaluate_text.py", "example-model", "text.txt")
    assert "nats/token" in capsys.readouterr().out
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "train_from_scratch.py",
        "sample_and_infill.py",
        "evaluate_text.py",
    }


def test_the_notebook_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    exec(compile(snippet, "docs/python.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[0]) < 5.5  # ln 257 = 5.55: untrained
    assert sedd_scale.load_pretrained(tmp_path / "notebook-model").block_length == 64


def small_model(*overrides: str) -> ScoreModel:
    shrunk = ("model.num_layers=1", "model.hidden_size=32", "model.num_heads=2", *overrides)
    return sedd_scale.new_model(
        ROOT / "configs/models/tiny.yaml", BytesTokenizer(), block_length=32, overrides=shrunk
    )


def test_evaluate_is_the_bound_whatever_way_text_comes(tmp_path: Path) -> None:
    model = small_model("model.zero_init=false", "model.dropout=0.5").train()
    ids = np.append(model.tokenizer.encode(TEXT), model.tokenizer.eos_id)
    blocks_nL = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    (tmp_path / "text.txt").write_text(TEXT)
    found = [
        sedd_scale.evaluate(model, draws=4, **given)
        for given in ({"text": TEXT}, {"tokens_nL": blocks_nL}, {"data": tmp_path / "text.txt"})
    ]
    assert model.training  # as it was, though dropout was off meanwhile
    expected = evaluate_bound(model.eval(), blocks_nL, draws=4)
    for result in found:
        assert (result.nats_per_token, result.stderr) == (expected.nats_per_token, expected.stderr)
    padded = sedd_scale.evaluate(model, ["Short.", "Texts."], remainder="pad", draws=4)
    assert (padded.blocks, padded.tokens) == (1, 14)


def test_a_plain_loop_learns_and_what_it_made_comes_back(tmp_path: Path) -> None:
    model = small_model("model.dropout=0.1")
    tokens_BL = torch.from_numpy(model.tokenizer.encode(TEXT)[:160]).view(5, 32)
    before = sedd_scale.evaluate(model, tokens_nL=tokens_BL, draws=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(tokens_BL).mean().backward()
        optimizer.step()
    after = sedd_scale.evaluate(model, tokens_nL=tokens_BL, draws=4)
    assert after.ci95[1] < before.ci95[0] - 0.5
    sigma_B = torch.full((5,), 0.7)
    expected = model.eval().log_score(tokens_BL, sigma_B)
    for format in ("sedd-hf", "native"):
        sedd_scale.save_pretrained(model, tmp_path / format, format=format)
        again = sedd_scale.load_pretrained(tmp_path / format)
        assert torch.equal(again.log_score(tokens_BL, sigma_B), expected)
        assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    with pytest.raises(CheckpointError, match="exists already"):
        sedd_scale.save_pretrained(model, tmp_path / "native")


def test_what_cannot_be_is_refused() -> None:
    model = small_model()
    with pytest.raises(DataError, match="exactly one"):
        sedd_scale.evaluate(model)
    with pytest.raises(DataError, match="less than one block"):
        sedd_scale.evaluate(model, "short")
    for number in ("max_blocks", "block_length"):
        with pytest.raises(DataError, match=f"{number}=0: give at least 1"):
            sedd_scale.evaluate(model, TEXT, **{number: 0})
    with pytest.raises(DataError, match="remainder"):
        sedd_scale.evaluate(model, TEXT, remainder="keep")
    with pytest.raises(ConfigError, match="protocol"):
        sedd_scale.evaluate(model, TEXT, protocol="none")
    with pytest.raises(ConfigError, match=r"model\.depth"):
        small_model("model.depth=3")
    with pytest.raises(AttributeError, match="gone"):
        sedd_scale.gone  # noqa: B018


def test_public_names_are_there_and_typed() -> None:
    for name in sedd_scale.__all__:
        assert getattr(sedd_scale, name) is not None
    assert (ROOT / "sedd_scale/py.typed").is_file()
