"""Conversions lose no bit, write nothing on failure and never over anything."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sedd_scale import load_pretrained
from sedd_scale.cli import run_command
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.convert import convert, write_native
from sedd_scale.model.parameters import logical_parameters
from tests.evaluation.enumeration import tiny_model
from tests.interop.tiny_checkpoints import write_checkpoint
from tools.convert_ckpt import build_parser, convert_command

CASES = ("absorb-loglinear", "uniform-geometric")


def run(*arguments: object) -> int:
    return run_command(build_parser(), convert_command, [str(argument) for argument in arguments])


@pytest.mark.parametrize("case", CASES)
def test_published_to_native_and_back_is_the_same_file(
    case: str, shared: Path, tmp_path: Path
) -> None:
    source = shared / "golden" / case
    assert run("--from", "sedd-hf", "--to", "native", source, tmp_path / "native") == 0
    assert run("--from", "native", "--to", "sedd-hf", tmp_path / "native", tmp_path / "back") == 0
    first, last = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back")
    )
    assert first.keys() == last.keys()
    for name, tensor in first.items():
        assert tensor.dtype == last[name].dtype and torch.equal(tensor, last[name]), name
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back")
    )
    after["model"]["name"] = before["model"]["name"]
    del after["noise"]["eps"]
    assert after == before

    golden = load_file(source / "golden.safetensors")
    scores = [
        load_pretrained(folder).log_score(golden["xt"], golden["sigma"])
        for folder in (source, tmp_path / "native", tmp_path / "back")
    ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("graph, noise", [("absorb", "cosine"), ("uniform", "linear")])
def test_native_to_published_and_back_keeps_model_and_tokenizer(
    graph: str, noise: str, tmp_path: Path
) -> None:
    native = write_checkpoint(tmp_path / "native", graph=graph, noise=noise)
    convert("native", "sedd-hf", native, tmp_path / "hf")
    convert("sedd-hf", "native", tmp_path / "hf", tmp_path / "again")
    models = [load_pretrained(tmp_path / name) for name in ("native", "hf", "again")]
    for model in models[1:]:
        assert model.config.noise == models[0].config.noise
        assert model.graph.name == graph and model.block_length == models[0].block_length
        assert model.tokenizer.fingerprint == models[0].tokenizer.fingerprint
        expected = logical_parameters(models[0].network, models[0].layout)
        for ours, theirs in zip(logical_parameters(model.network, model.layout), expected):
            assert ours.name == theirs.name
            assert torch.equal(ours.parameter, theirs.parameter), ours.name


def test_either_kind_of_weights_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sedd_scale.interop.convert as convert_module

    class Shifted(convert_module._WholeParameters):
        def get(self, parameter, key):  # type: ignore[no-untyped-def]
            fragment = super().get(parameter, key)
            return type(fragment)(fragment.flat + (key == "ema"), fragment.start)

    monkeypatch.setattr(convert_module, "_WholeParameters", Shifted)
    write_native(tiny_model("absorb", "loglinear"), tmp_path / "native", None)
    for weights in ("ema", "master"):
        convert("native", "sedd-hf", tmp_path / "native", tmp_path / weights, weights=weights)
    ema, master = (load_file(tmp_path / kind / "model.safetensors") for kind in ("ema", "master"))
    name = "output_layer.linear.weight"
    torch.testing.assert_close(ema[name], master[name] + 1)


def test_what_the_published_format_cannot_say_is_not_exported(tmp_path: Path) -> None:
    model = tiny_model("absorb", "loglinear")
    model.config = model.config.override("model.time_conditioning=false")
    write_native(model, tmp_path / "native", None)
    assert not load_pretrained(tmp_path / "native").time_conditioned
    with pytest.raises(CheckpointError, match="time_conditioning=false cannot be written"):
        convert("native", "sedd-hf", tmp_path / "native", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = write_checkpoint(tmp_path / "native")
    (tmp_path / "there").mkdir()
    assert run("--from", "native", "--to", "sedd-hf", native, tmp_path / "there") == 2
    assert "there exists already" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []


def test_formats_to_come_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--from", "mdlm", "--to", "native", tmp_path, tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert "no conversion from mdlm to native" in error and "sedd-hf to native" in error
    assert len(error.splitlines()) == 1


def test_an_incomplete_source_leaves_nothing(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(shared / "golden" / CASES[0], source)
    tensors = load_file(source / "model.safetensors")
    del tensors["output_layer.linear.bias"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing output_layer\.linear\.bias"):
        convert("sedd-hf", "native", source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_wrong_format_is_named(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native")
    convert("native", "sedd-hf", native, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="use --from sedd-hf"):
        convert("native", "sedd-hf", tmp_path / "hf", tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        convert("sedd-hf", "native", native, tmp_path / "new")
    with pytest.raises(CheckpointError, match="nowhere"):
        convert("sedd-hf", "native", tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()
