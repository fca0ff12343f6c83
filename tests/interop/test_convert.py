"""Conversions lose no bit, write nothing on failure and never over anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sedd_scale import load_pretrained, save_pretrained
from sedd_scale.__main__ import main
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.convert import convert
from sedd_scale.interop.model_source import ModelSource
from sedd_scale.interop.native import write_native_run
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel
from tests.evaluation.enumeration import tiny_model
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import GOLDEN
from tests.tolerance import NETWORK

CASES = ("absorb-loglinear", "uniform-geometric")


def run(*arguments: object) -> int:
    return main(["convert_ckpt", *map(str, arguments)])


@pytest.mark.parametrize("case", CASES)
def test_published_to_native_and_back_is_the_same_file(case: str, tmp_path: Path) -> None:
    source = GOLDEN / case
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
    # What the reference computes from its own file, through each of our conversions.
    convert("native", "sedd-train", tmp_path / "native", tmp_path / "theirs.pth")
    graph, noise = case.split("-")
    said = Assumptions(graph=graph, noise=noise, block_length=16, sigma_max=20.0)
    model = load_pretrained(tmp_path / "theirs.pth", assumptions=said)
    scores.append(model.log_score(golden["xt"], golden["sigma"]))
    expected = golden["log_score"]
    for found in scores:
        assert float((found - expected).norm() / expected.norm()) < NETWORK


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


class Shifted(ModelSource):
    """Averages that are the weights plus one."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model)
        self.holds = frozenset({"ema", "master"})

    def _read(self, name: str, key: str) -> torch.Tensor:
        return super()._read(name, key) + (key == "ema")


def test_either_kind_of_weights_is_exported(tmp_path: Path) -> None:
    write_native_run(Shifted(tiny_model("absorb", "loglinear")), tmp_path / "native")
    for weights in ("ema", "master"):
        convert("native", "sedd-hf", tmp_path / "native", tmp_path / weights, weights=weights)
    ema, master = (load_file(tmp_path / kind / "model.safetensors") for kind in ("ema", "master"))
    name = "output_layer.linear.weight"
    torch.testing.assert_close(ema[name], master[name] + 1)


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = write_checkpoint(tmp_path / "native")
    (tmp_path / "there").mkdir()
    assert run("--from", "native", "--to", "sedd-hf", native, tmp_path / "there") == 2
    assert "there exists already" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mlp_ratio": 2}, "whose models all have 4"),
        ({"rotary_base": 100.0}, "whose readers all turn by 10000"),
        ({"time_conditioning": False}, "all conditioned on sigma"),
        ({"parametrisation": "mean"}, "take a network's outputs for log-scores"),
    ],
)
def test_what_the_published_format_cannot_say_is_not_written(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = tiny_model("absorb", "loglinear", changes=change)
    save_pretrained(model, tmp_path / "native", format="native")
    (key,) = change
    with pytest.raises(CheckpointError, match=rf"model\.{key}=.* cannot be written .*{reason}"):
        convert("native", "sedd-hf", tmp_path / "native", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_what_outputs_are_and_where_is_kept_by_native_files_alone(tmp_path: Path) -> None:
    model = tiny_model("absorb mean", "loglinear", shift=True)
    save_pretrained(model, tmp_path / "native", format="native")
    found = load_pretrained(tmp_path / "native")
    blocks_BL, t_B = torch.tensor([[0, 2], [1, 1]]), torch.tensor([0.9, 0.6]).double()
    noisy_BL = torch.tensor([[3, 3], [1, 3]])
    assert torch.equal(*(one.loss(blocks_BL, t_B, noisy_BL) for one in (model, found)))
    assert torch.equal(*(one.log_score(noisy_BL, t_B) for one in (model, found)))
    with pytest.raises(CheckpointError, match=r"training\.shift=true cannot be written"):
        convert("native", "sedd-hf", tmp_path / "native", tmp_path / "hf")


def test_a_model_without_a_block_length_is_not_exported(tmp_path: Path) -> None:
    model = tiny_model("absorb", "loglinear")
    model.block_length = None
    with pytest.raises(CheckpointError, match="does not name its block length"):
        save_pretrained(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_mdlm_is_read_only(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no conversion from native to mdlm"):
        convert("native", "mdlm", tmp_path, tmp_path / "new")


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_shards_are_one_model(tmp_path: Path, shard_bytes: int) -> None:
    source = GOLDEN / CASES[0]
    convert("sedd-hf", "sedd-hf", source, tmp_path / "shards", shard_bytes=shard_bytes)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    whole = load_file(source / "model.safetensors")
    parts = [load_file(file) for file in files]
    assert len(files) > 3 and sum(len(part) for part in parts) == len(whole)
    for part in parts:
        size = sum(tensor.nbytes for tensor in part.values())
        assert size <= shard_bytes or len(part) == 1
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name]), name
    convert("sedd-hf", "native", tmp_path / "shards", tmp_path / "native")
    convert("native", "sedd-hf", tmp_path / "native", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], whole[name]) for name in whole)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"incomplete: {files[1].name} is missing"):
        load_pretrained(tmp_path / "shards")


def test_pytorch_bin_is_read(tmp_path: Path) -> None:
    source = GOLDEN / CASES[0]
    whole = load_file(source / "model.safetensors")
    for folder, zipped in (("zip", True), ("legacy", False)):
        (tmp_path / folder).mkdir()
        shutil.copy(source / "config.json", tmp_path / folder)
        torch.save(
            whole,
            tmp_path / folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=zipped,
        )
        convert("sedd-hf", "sedd-hf", tmp_path / folder, tmp_path / f"{folder}-back")
        back = load_file(tmp_path / f"{folder}-back" / "model.safetensors")
        assert all(torch.equal(back[name], whole[name]) for name in whole)


def test_verify_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = GOLDEN / CASES[0]
    convert("sedd-hf", "native", source, tmp_path / "native")
    assert run("verify", source, tmp_path / "native", "--tolerance", 0) == 0
    assert "max difference 0 " in capsys.readouterr().out
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["output_layer.linear.bias"][3] += 0.25
    save_file(tensors, changed / "model.safetensors")
    assert run("verify", source, changed) == 1
    assert "max difference 0.25 " in capsys.readouterr().out
    assert run("verify", source, GOLDEN / CASES[1]) == 2
    assert "different models: graph is absorb and uniform" in capsys.readouterr().err
    assert run("inspect", tmp_path / "native") == 0
    text = capsys.readouterr().out
    assert "format      native" in text and "absorb, 50 tokens" in text
    assert "blocks.*.attention.linear_qkv.weight/exp_avg" in text
    assert "step        0, 0 updates of the optimizer" in text
    assert run("inspect", source) == 0
    assert "step        not known" in capsys.readouterr().out


def test_a_damaged_native_source_is_refused(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native")
    (data,) = native.glob("checkpoints/step-0/*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        convert("native", "sedd-hf", native, tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_an_incomplete_source_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / CASES[0], source)
    tensors = load_file(source / "model.safetensors")
    del tensors["output_layer.linear.bias"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing output_layer\.linear\.bias \[51\]"):
        convert("sedd-hf", "native", source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    tensors["output_layer.linear.bias"] = torch.zeros(52)
    tensors["blocks.1.attn_out.weight"] = torch.zeros(64, 60)
    save_file(tensors, source / "model.safetensors")
    for target in ("native", "sedd-train"):
        with pytest.raises(
            CheckpointError,
            match=r"misshapen: blocks\.1\.attn_out\.weight is \[64, 60\] and should be "
            r"\[64, 64\], output_layer\.linear\.bias is \[52\] and should be \[51\]",
        ):
            convert("sedd-hf", target, source, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_wrong_format_is_named(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native")
    convert("native", "sedd-hf", native, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="use --from sedd-hf"):
        convert("native", "sedd-hf", tmp_path / "hf", tmp_path / "new")
    with pytest.raises(CheckpointError, match="use --from native"):
        convert("sedd-hf", "native", native, tmp_path / "new")
    with pytest.raises(CheckpointError, match="nowhere"):
        convert("sedd-hf", "native", tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()
