"""Checkpoints as other programs write them: all are read as what they are, or asked about."""

import argparse
import collections
import enum
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sedd_scale import load_pretrained, save_pretrained
from sedd_scale.__main__ import main
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.model_source import ModelSource
from sedd_scale.interop.native import write_native_run
from sedd_scale.interop.sedd_names import published_names, published_rows
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.planning.model_states import STATE_KEYS
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from tests.datasets import dataset_of_words
from tests.evaluation.enumeration import tiny_model
from tests.repository import ROOT

LENGTH, TOKENS = 8, 257
MDLM = {"objective": "masked_cross_entropy", "time_conditioning": False}


def published(model: ScoreModel) -> dict[str, Tensor]:
    """A model's tensors as SEDD's network names them, its rotary buffer included."""
    source, shape = ModelSource(model), model.config.model
    tensors = {
        theirs: published_rows(ours, source.read(ours, "ema"), shape.num_heads).contiguous()
        for theirs, ours in published_names(shape.num_layers).items()
    }
    head_dim = shape.hidden_size // shape.num_heads
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return {**tensors, "rotary_emb.inv_freq": frequencies}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def sedd() -> ScoreModel:
    return tiny_model("absorb", "loglinear", num_tokens=TOKENS, block_length=LENGTH)


@pytest.fixture(scope="module")
def mdlm() -> ScoreModel:
    return tiny_model("absorb", "loglinear", num_tokens=TOKENS, block_length=LENGTH, seed=1, **MDLM)


@pytest.fixture(scope="module")
def duo() -> ScoreModel:
    return tiny_model("mean", "loglinear", num_tokens=TOKENS, block_length=LENGTH, seed=2)


def assert_same(found: ScoreModel, expected: ScoreModel) -> None:
    assert found.objective.name == expected.objective.name
    assert found.config.model.parametrisation == expected.config.model.parametrisation
    assert found.graph.name == expected.graph.name
    tokens_BL = torch.randint(TOKENS, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    if expected.graph.name == "absorb":
        tokens_BL[:, ::2] = TOKENS
    sigma_B = torch.tensor([0.3, 2.0])
    torch.testing.assert_close(
        found.log_score(tokens_BL, sigma_B), expected.log_score(tokens_BL, sigma_B)
    )


def opened(path: Path, **said: Any) -> ScoreModel:
    return load_pretrained(path, assumptions=Assumptions(**said) if said else None)


# What the wrappers of torch, Lightning, DeepSpeed and FSDP put before and between names.
PREFIXES = (
    "backbone.",
    "module.backbone.",
    "backbone._orig_mod.",
    "_orig_mod.module.backbone.module.",
    "_forward_module.backbone.",
    "model.backbone._fsdp_wrapped_module.",
    "model.",
    "net.score_model.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".pt"])
def test_wrappers_in_any_order(mdlm: ScoreModel, prefix: str, suffix: str, tmp_path: Path) -> None:
    state, file = prefixed(prefix, published(mdlm)), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if suffix == ".ckpt" else state, file)
    assert_same(opened(file, block_length=LENGTH), mdlm)


def test_a_wrapper_between_the_names(mdlm: ScoreModel, tmp_path: Path) -> None:
    state = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): tensor
        for name, tensor in prefixed("backbone.", published(mdlm)).items()
    }
    torch.save({"module": state}, tmp_path / "mp_rank_00_model_states.pt")  # DeepSpeed's
    assert_same(opened(tmp_path / "mp_rank_00_model_states.pt"), mdlm)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.", "module.module.", "score_model._orig_mod."]
)
def test_wrappers_in_the_authors_checkpoint(sedd: ScoreModel, prefix: str, tmp_path: Path) -> None:
    tensors = published(sedd)
    averages = [tensor for name, tensor in tensors.items() if "inv_freq" not in name]
    tree = {"model": prefixed(prefix, tensors), "ema": {"shadow_params": averages}}
    optimizer = {"state": {}, "param_groups": [{"params": list(range(len(averages)))}]}
    folder = tmp_path / "checkpoints-meta"
    folder.mkdir()
    torch.save({**tree, "optimizer": optimizer, "step": 5}, folder / "checkpoint.pth")
    for path in (folder / "checkpoint.pth", folder, tmp_path):
        assert_same(opened(path), sedd)
    # Its program's configuration lies above it.
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text(
        "graph: {type: absorb}\nnoise: {type: geometric, sigma_min: 1e-3, sigma_max: 8.0}\n"
        "model: {length: 8, n_heads: 2, scale_by_sigma: true, dropout: 0.1}\ntokens: 257\n"
    )
    model = opened(tmp_path)
    assert (model.schedule.name, model.block_length) == ("geometric", LENGTH)
    with pytest.raises(CheckpointError, match=r"says graph\.type=absorb, not uniform"):
        opened(tmp_path, graph="uniform")


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "backbone."])
@pytest.mark.parametrize("kind", ["bin", "sharded bin", "sharded safetensors"])
def test_a_published_directory_however_its_weights_lie(
    sedd: ScoreModel, prefix: str, kind: str, tmp_path: Path
) -> None:
    save_pretrained(sedd, tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    state = prefixed(prefix, published(sedd))
    if kind == "bin":
        torch.save(state, tmp_path / "hf/pytorch_model.bin")
    else:
        base = "model" if "safe" in kind else "pytorch_model"
        suffix = "safetensors" if "safe" in kind else "bin"
        weight_map = {}
        for number in range(2):
            part = dict(list(state.items())[number::2])
            name = f"{base}-0000{number + 1}-of-00002.{suffix}"
            weight_map |= dict.fromkeys(part, name)
            (save_file if "safe" in kind else torch.save)(part, tmp_path / "hf" / name)
        index = tmp_path / "hf" / f"{base}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_same(opened(tmp_path / "hf" / name), sedd)  # a shard stands for all
        assert_same(opened(index), sedd)
    assert_same(opened(tmp_path / "hf"), sedd)
    if kind != "bin":
        (tmp_path / "hf" / name).unlink()
        with pytest.raises(CheckpointError, match=f"incomplete: {name} is missing"):
            opened(tmp_path / "hf")


def test_what_a_file_holds_tells_its_format(mdlm: ScoreModel, tmp_path: Path) -> None:
    state = prefixed("backbone.", published(mdlm))
    torch.save({"state_dict": state}, tmp_path / "pickled.safetensors")
    save_file(state, tmp_path / "safe.ckpt")
    torch.save({"model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "no-suffix")
    for name in ("pickled.safetensors", "safe.ckpt", "no-suffix"):
        assert_same(opened(tmp_path / name), mdlm)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.to(torch.int8), r"vocab_embed\.embedding is int8, quantised"),
        (lambda t: t.to("meta"), "saved without its numbers"),
        (lambda t: t.to_sparse(), r"is sparse_coo, quantised or sparse"),
    ],
)
def test_weights_without_their_numbers_are_refused(
    mdlm: ScoreModel, change: Any, match: str, tmp_path: Path
) -> None:
    state = {name: change(t) for name, t in prefixed("backbone.", published(mdlm)).items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=match):
        opened(tmp_path / "x.ckpt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_read(mdlm: ScoreModel, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: t.to(dtype) for name, t in prefixed("backbone.", published(mdlm)).items()}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    save_file(state, tmp_path / "x.safetensors")
    for name in ("x.ckpt", "x.safetensors"):
        found = dict(opened(tmp_path / name).named_parameters())
        for key, parameter in mdlm.named_parameters():
            assert torch.equal(found[key], parameter.to(dtype).float()), key


class Box(dict[str, Any]):
    pass


class Row(NamedTuple):
    length: int


class Mode(enum.Enum):
    FAST = 1


class Sequence(list[int]):
    pass


class Plain:
    def __init__(self) -> None:
        self.me, self.size = self, 3


class Slots:
    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 3


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


class Evaluated:
    def __reduce__(self) -> Any:
        return (eval, ("__import__('os').mkdir('executed')",))


BESIDE: dict[str, Any] = {
    "dict": Box(lr=1),
    "list": Sequence([1, 2]),
    "namedtuple": Row(8),
    "enum": {Mode.FAST: Mode.FAST},
    "plain": Plain(),
    "slots": Slots(),
    "set": {Row(8)},
    "namespace": argparse.Namespace(lr=1),
    "defaultdict": collections.defaultdict(Box, a=Box()),
    "deque": collections.deque([1]),
    "path": Path("x"),
    "module": torch.nn.Linear(2, 2),
    "call": Bomb(),
    "eval": Evaluated(),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_tensors_are_inert(
    mdlm: ScoreModel, name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = prefixed("backbone.", published(mdlm))
    tree = {
        "hyper_parameters": {"config": BESIDE[name]},
        "state_dict": Box(state),
        "it": BESIDE[name],
    }
    torch.save(tree, "x.ckpt", _use_new_zipfile_serialization=zipped)
    assert_same(opened(Path("x.ckpt")), mdlm)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "a.bin"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(text)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(CheckpointError, match="git lfs pull"):
            opened(path)


def test_a_program_of_torchscript_is_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="program of TorchScript"):
        opened(tmp_path / "x.pt")


class DictConfig:
    """As OmegaConf pickles its mappings."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._parent = self
        self._content = {
            key: DictConfig(value) if isinstance(value, dict) else AnyNode(value)
            for key, value in content.items()
        }


class AnyNode:
    def __init__(self, value: Any) -> None:
        self._val = value


TRAINED = {"model": {"n_heads": 2, "length": LENGTH, "scale_by_sigma": True}}
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mdlm": ("mdlm", {"parameterization": "subs", "diffusion": "absorbing_state", **TRAINED}),
    "sedd": ("sedd", {"parameterization": "sedd", "time_conditioning": True, **TRAINED}),
    "duo": ("duo", {"algo": {"name": "duo_base", "parameterization": "mean"}, **TRAINED}),
    "udlm": ("duo", {"parameterization": "d3pm", "diffusion": "uniform", **TRAINED}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_configuration_within_a_lightning_file_is_read(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind, content = CONFIGURATIONS[name]
    model = request.getfixturevalue(kind)
    state = prefixed("backbone.", published(model))
    beside = {
        "config": DictConfig({"noise": {"type": "log-linear"}, **content}),
        "tokenizer": Plain(),
    }
    torch.save({"state_dict": state, "hyper_parameters": beside}, tmp_path / "last.ckpt")
    found = opened(tmp_path / "last.ckpt")
    assert_same(found, model)
    assert found.block_length == LENGTH
    # Lightning's folder of one checkpoint; of two, somebody has to choose.
    shutil.copytree(tmp_path, tmp_path.parent / f"run-{name}/checkpoints")
    run = tmp_path.parent / f"run-{name}"
    assert_same(opened(run), model)
    shutil.copy(run / "checkpoints/last.ckpt", run / "checkpoints/best.ckpt")
    with pytest.raises(CheckpointError, match=r"several checkpoints \(best.ckpt, last.ckpt\)"):
        opened(run)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("duo", {"model_type": "DUO", "architectures": ["DUO"], "causal": False}),
        ("duo", {"architectures": ["DUO"]}),
        ("duo", {"model_type": "udlm"}),
        ("mdlm", {"model_type": "mdlm", "time_conditioning": False}),
        ("sedd", {"model_type": "sedd", "model_length": LENGTH}),
    ],
)
def test_model_type_and_architectures_are_read(
    kind: str, said: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    save_file(prefixed("backbone.", published(model)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert_same(opened(tmp_path), model)
    assert_same(opened(tmp_path / "model.safetensors"), model)
    if kind != "sedd":  # which knows both
        other = "absorb" if kind == "duo" else "uniform"
        with pytest.raises(CheckpointError, match=rf"config\.json says .*, not {other}"):
            opened(tmp_path, graph=other)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"model_type": "ours"}, "model_type=ours, which is not known here.*--objective"),
        ({"model_type": "bd3lm"}, "model_type=bd3lm, a network of another attention"),
        ({"model_type": "mdlm", "causal": True}, "causal=true, a network which attends"),
        ({"model_type": "mdlm", "noise": {"type": "polynomial"}}, r"noise\.type=poly.*--noise"),
    ],
)
def test_what_is_not_known_is_asked_for(
    mdlm: ScoreModel, said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    save_file(prefixed("backbone.", published(mdlm)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=match):
        opened(tmp_path)
    if "--" in match:
        assert_same(opened(tmp_path, objective="masked_cross_entropy", noise="loglinear"), mdlm)


def test_a_score_entropy_network_in_another_framework_can_be_said(
    sedd: ScoreModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, native = tmp_path / "sedd.ckpt", tmp_path / "native"
    torch.save({"state_dict": prefixed("backbone.", published(sedd))}, file)
    said = ["--objective", "score_entropy", "--block-length", str(LENGTH)]
    words = ["convert_ckpt", "--from", "mdlm", "--to", "native", *said, str(file), str(native)]
    assert main(words) == 0
    assert_same(opened(native), sedd)
    # Without, what is assumed is told.
    assert opened(file).objective.name == "masked_cross_entropy"
    assert "assumed is --objective masked_cross_entropy --graph absorb" in capsys.readouterr().err


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_two_readings_are_named(
    sedd: ScoreModel, duo: ScoreModel, graph: str, tmp_path: Path
) -> None:
    bare, wrapped = tmp_path / "bare.pt", tmp_path / "wrapped.ckpt"
    tensors = published(sedd if graph == "absorb" else duo)
    torch.save(tensors, bare)
    torch.save({"state_dict": prefixed("backbone.", tensors)}, wrapped)
    if graph == "absorb":
        with pytest.raises(CheckpointError, match=r"--objective score.* or --objective masked"):
            opened(bare)
        assert_same(opened(bare, objective="score_entropy"), sedd)
        return
    for path, said in ((bare, {}), (wrapped, {"objective": "score_entropy"})):
        with pytest.raises(
            CheckpointError, match=r"--parametrisation mean .* --parametrisation score"
        ):
            opened(path, graph="uniform", **said)
        assert_same(opened(path, graph="uniform", parametrisation="mean", **said), duo)
        found = opened(path, graph="uniform", parametrisation="score", **said)
        assert found.config.model.parametrisation == "score"


def test_several_networks_in_a_file_are_named(
    mdlm: ScoreModel, sedd: ScoreModel, tmp_path: Path
) -> None:
    ours, teacher = prefixed("backbone.", published(mdlm)), prefixed("teacher.", published(sedd))
    torch.save({"state_dict": {**ours, **teacher}}, tmp_path / "two.ckpt")
    with pytest.raises(CheckpointError, match=r"'state_dict\.backbone\.', 'state_dict\.teacher\.'"):
        opened(tmp_path / "two.ckpt")
    assert_same(opened(tmp_path / "two.ckpt", network="state_dict.backbone."), mdlm)
    # Weights and averages that both have names are told apart.
    torch.save({"model": ours, "ema": prefixed("backbone.", published(sedd))}, tmp_path / "e.pt")
    for weights, model in (("master", mdlm), ("ema", sedd)):
        found = load_pretrained(
            tmp_path / "e.pt", weights=weights, assumptions=Assumptions(**_meaning(model))
        )
        assert_same(found, model)


def _meaning(model: ScoreModel) -> dict[str, Any]:
    return {
        "objective": model.objective.name,
        "time_conditioning": model.config.model.time_conditioning,
    }


def test_a_mask_among_the_tokens_becomes_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states, mask = 35, 4
    model = tiny_model("absorb", "loglinear", num_tokens=states - 1, block_length=LENGTH, **MDLM)
    theirs = published(model)
    order = [*range(mask), states - 1, *range(mask, states - 1)]  # the mask into its place
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        theirs[name] = theirs[name][order].clone()
    file = tmp_path / "text8.ckpt"
    torch.save({"state_dict": prefixed("backbone.", theirs)}, file)
    with pytest.raises(CheckpointError, match=r"35 states.*--mask-id 4, or --mask-id 34"):
        opened(file)
    with pytest.raises(CheckpointError, match="--mask-id 35, which is none of its 35 states"):
        opened(file, mask_id=35)
    found = opened(file, mask_id=mask)
    tokens_BL = torch.full((1, LENGTH), states - 1)
    sigma_B = torch.tensor([0.5])
    assert torch.equal(found.log_score(tokens_BL, sigma_B), model.log_score(tokens_BL, sigma_B))
    output = tmp_path / "drawn.jsonl"
    drawn = ["--length", "64", "--steps", "4", "--num-samples", "8", "--output", str(output)]
    assert main(["generate", "--checkpoint", str(file), "--mask-id", "4", *drawn]) == 0
    ids = {t for line in output.read_text().splitlines() for t in json.loads(line)["tokens"]}
    assert mask in ids and max(ids) < states - 1


def test_a_vocabulary_with_unused_ids_behind_the_tokenizers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra, code in ((1, 0), (63, 0), (300, 2)):
        folder = tmp_path / f"duo-{extra}"
        folder.mkdir()
        model = tiny_model("mean", "loglinear", num_tokens=TOKENS + extra, block_length=LENGTH)
        save_file(prefixed("backbone.", published(model)), folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "DUO", "model_length": 8}')
        BytesTokenizer().save(tmp_path / "bytes")
        (tmp_path / "held.txt").write_text("some text to be read. " * 9)
        words = ["--checkpoint", str(folder), "--tokenizer-path", str(tmp_path / "bytes")]
        draws = ["--draws", "2", "--max-blocks", "1", "--json"]
        held = ["--data", str(tmp_path / "held.txt")]
        assert main(["eval_ppl", *words, *held, *draws]) == code
        said = capsys.readouterr()
        assert f"has 257 tokens and the checkpoint {TOKENS + extra}" in said.err
        if code == 0:
            data = dataset_of_words(tmp_path / f"data-{extra}", 4, block_length=LENGTH)
            assert main(["eval_ppl", *words, "--data", str(data), "--split", "train", *draws]) == 0
            output = tmp_path / f"{extra}.jsonl"
            drawn = ["--num-samples", "40", "--steps", "2", "--output", str(output)]
            assert main(["generate", *words, *drawn]) == 0
            records = [json.loads(line) for line in output.read_text().splitlines()]
            assert all(isinstance(record["text"], str) for record in records)


def test_every_command_takes_what_eval_takes(
    mdlm: ScoreModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = prefixed("backbone.", published(mdlm))
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "folder").mkdir()
    torch.save({"state_dict": state}, tmp_path / "folder/only.ckpt")
    native = tmp_path / "native"
    write_native_run(ModelSource(mdlm), native)
    for number, name in enumerate(("a.ckpt", "a.safetensors", "folder")):
        path = str(tmp_path / name)
        output = str(tmp_path / f"{number}.jsonl")
        drawn = ["--length", "8", "--steps", "2", "--output", output]
        assert main(["generate", "--checkpoint", path, *drawn]) == 0
        assert main(["convert_ckpt", "inspect", path]) == 0
        assert main(["convert_ckpt", "verify", path, str(native), "--block-length", "8"]) == 0
        target = str(tmp_path / f"native-{number}")
        assert main(["convert_ckpt", "--from", "mdlm", "--to", "native", path, target]) == 0
        source = open_checkpoint(tmp_path / name)
        assert source.read("head.linear.bias", STATE_KEYS[0]).shape == (TOKENS + 1,)
    assert "error" not in capsys.readouterr().err


def test_a_run_beside_weights_of_another_format_is_asked_about(
    sedd: ScoreModel, tmp_path: Path
) -> None:
    save_pretrained(sedd, tmp_path / "both")
    write_native_run(ModelSource(sedd), tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "both/checkpoints")
    with pytest.raises(CheckpointError, match="a run and weights of another format"):
        opened(tmp_path / "both")
    assert_same(opened(tmp_path / "both/checkpoints"), sedd)


def written(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def described_as(config: Any, state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config), encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: [state, {"epoch": 3}],
        lambda state: {"model": (state, 5)},
        lambda state: {"n_averaged": torch.tensor(5), **prefixed("module.", state)},
        lambda state: {"model": state, "history": [[1], {"loss": 2.0}]},
    ],
    ids=["list", "tuple", "counter of averages", "lists beside it"],
)
def test_other_containers_are_read(mdlm: ScoreModel, wrap: Any, tmp_path: Path) -> None:
    tree = wrap(published(mdlm))
    file = written(tmp_path / "x.ckpt", tree)
    assert_same(opened(file, block_length=LENGTH, objective="masked_cross_entropy"), mdlm)


def test_a_tree_that_holds_itself_is_read(mdlm: ScoreModel, tmp_path: Path) -> None:
    tree: dict[str, Any] = {"state_dict": prefixed("backbone.", published(mdlm))}
    tree["trainer"] = [tree]
    assert_same(opened(written(tmp_path / "x.ckpt", tree)), mdlm)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"model_type": "mdlm", "parameterization": "mean"}, "mdlm and parameter.*=mean, two"),
        ({"model_type": "sedd", "parameterization": "subs"}, "sedd and parameter.*=subs, two"),
        ({"model_type": "mdlm", "architectures": ["DUO"]}, "mdlm and architectures=DUO, two"),
        ({"model_type": "mdlm", "n_heads": "two"}, "n_heads='two', which is no int"),
        ({"model_type": "mdlm", "n_heads": 2.5}, "n_heads=2.5, which is no int"),
        ({"model_type": "mdlm", "time_conditioning": "never"}, "='never', which is no bool"),
        ({"model_type": "mdlm", "mask_index": 900}, "says mask_index=900, which is none of its"),
    ],
)
def test_what_contradicts_itself_is_not_chosen_from(
    mdlm: ScoreModel, said: dict[str, Any], match: str, tmp_path: Path
) -> None:
    state = prefixed("backbone.", published(mdlm))
    with pytest.raises(CheckpointError, match=match):
        opened(described_as(said, state, tmp_path))


def test_a_published_configuration_of_another_kind_is_refused(
    sedd: ScoreModel, tmp_path: Path
) -> None:
    save_pretrained(sedd, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**raw, "model_type": "duo"}))
    with pytest.raises(CheckpointError, match="as SEDD's, and says model_type=duo"):
        opened(tmp_path / "hf")


def test_two_configurations_that_differ_are_named(mdlm: ScoreModel, tmp_path: Path) -> None:
    tree = {
        "state_dict": prefixed("backbone.", published(mdlm)),
        "hyper_parameters": {"config": {"algo": {"name": "mdlm"}}},
    }
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("algo: {name: duo}\n")
    with pytest.raises(CheckpointError, match=r"algo\.name=mdlm.*but .*algo\.name=duo"):
        opened(written(tmp_path / "x.ckpt", tree))


def test_numbers_as_text_and_a_byte_order_mark_are_read(mdlm: ScoreModel, tmp_path: Path) -> None:
    said = {"model_type": "mdlm", "model_length": str(LENGTH), "time_conditioning": "false"}
    noise = {"noise": {"type": "loglinear", "eps": "1e-2"}, "n_heads": "${model.heads}"}
    state = prefixed("backbone.", published(mdlm))
    model = opened(described_as("\ufeff" + json.dumps({**said, **noise}), state, tmp_path))
    assert model.config.noise.eps == 1e-2
    assert model.block_length == LENGTH and not model.config.model.time_conditioning


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["model-00001-of-00002.safetensors"], "index .* is missing: fetch it too"),
        (["snapshots/1f/model.safetensors"], "name one in it, as .*snapshots/1f/model.safe"),
        (["latest", "global_step9/mp_rank_00_model_states.pt"], "as .*rank_00_model_states.pt"),
        ([".metadata", "__0_0.distcp"], "another program: .*dcp_to_torch"),
    ],
    ids=["shard without its index", "cache of a hub", "DeepSpeed", "distributed"],
)
def test_directories_that_are_no_checkpoint_say_what_to_give(
    names: list[str], match: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("global_step9" if name == "latest" else "")
    with pytest.raises(CheckpointError, match=match):
        opened(tmp_path)


def test_what_lies_beside_weights_is_not_taken_for_them(mdlm: ScoreModel, tmp_path: Path) -> None:
    written(tmp_path / "a.ckpt", {"state_dict": prefixed("backbone.", published(mdlm))})
    for name in ("._a.ckpt", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"no weights")
    assert_same(opened(tmp_path), mdlm)


def test_one_file_wins_over_an_index_left_beside_it(mdlm: ScoreModel, tmp_path: Path) -> None:
    described_as({"model_type": "mdlm"}, prefixed("backbone.", published(mdlm)), tmp_path)
    index = {"weight_map": {"backbone.vocab_embed.embedding": "model-00001-of-00009.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(opened(tmp_path), mdlm)


def test_lm_eval_takes_the_options_by_name(
    mdlm: ScoreModel, sedd: ScoreModel, tmp_path: Path
) -> None:
    harness = pytest.importorskip("sedd_scale.evaluation.harness")
    BytesTokenizer().save(tmp_path / "tokenizer")
    state = prefixed("backbone.", published(mdlm)) | prefixed("teacher.", published(sedd))
    path = written(tmp_path / "two.ckpt", {"state_dict": state})

    def model(**options: object) -> ScoreModel:
        found = harness.SeddScaleLM(str(path), device="cpu", batch_size=2, **options).model
        assert isinstance(found, ScoreModel)
        return found

    with pytest.raises(CheckpointError, match=r"say which with network$"):
        model()
    for name, objective, expected in (
        ("backbone", "masked_cross_entropy", mdlm),
        ("teacher", "score_entropy", sedd),
    ):
        with pytest.raises(DataError, match="give tokenizer_path=PATH"):
            model(network=name, objective=objective)
        said = {"network": name, "objective": objective, "block_length": LENGTH}
        found = model(**said, tokenizer_path=tmp_path / "tokenizer", time_conditioning=None)
        assert_same(found, expected)
    for wrong, match in (
        ({"objective": "sedd"}, "argument objective: invalid choice: 'sedd'"),
        ({"mask_id": 4.5}, "argument mask_id: invalid int value: '4.5'"),
        ({"weights": "last"}, "argument weights: invalid choice"),
        ({"draw": 3}, "unrecognized arguments: draw=3"),
    ):
        with pytest.raises(ConfigError, match=f"the model's arguments: {match}"):
            model(**wrong)


def test_training_takes_the_options_of_what_it_starts_from(
    mdlm: ScoreModel, duo: ScoreModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset_of_words(tmp_path / "data", 40, block_length=LENGTH, valid_fraction=0)
    tiny = ("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "model.cond_dim=8")
    loop = ("training.global_batch=4", "training.micro_batch=4", "training.steps=1")
    still = ("training.valid_every=0", "optimizer.lr=1e-30")  # moves no number of float32
    words = ("train", str(ROOT / "configs/runs/tiny.yaml"), f"data.path={data}")

    def started(name: str, source: Path, options: str, *overrides: str) -> str:
        capsys.readouterr()
        given = [f"model.init_from={source}", *([f"model.init_options={options}"] * bool(options))]
        run = ["--run-dir", str(tmp_path / name), *tiny, *loop, *still, *given, *overrides]
        code = main([*words, *run])
        error = "".join(line for line in capsys.readouterr().err.splitlines() if "error" in line)
        assert code == (2 if error else 0), error
        return error

    # A mask among the tokens, and a network whose names do not say what it is.
    state = published(mdlm)
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        state[name] = torch.cat([state[name][:4], state[name][-1:], state[name][4:-1]])
    masked = written(tmp_path / "masked.pt", state)
    own = ("training.objective=masked_cross_entropy", "model.time_conditioning=false")
    asked = started("a", masked, "", *own)
    assert "give model.init_options=objective=score_entropy (log-scores" in asked
    assert "or model.init_options=objective=masked_cross_entropy (logits" in asked
    said = f"objective=masked_cross_entropy,mask_id=4,block_length={LENGTH}"
    assert not started("a", masked, said, *own)
    assert_same(load_pretrained(tmp_path / "a"), mdlm)
    # What the run is for is not what its source was for.
    other = written(tmp_path / "duo.pt", prefixed("backbone.", published(duo)))
    assert "set graph.name=uniform" in started("b", other, "graph=uniform")
    uniform = ("graph.name=uniform", "model.parametrisation=mean")
    asked = started("b", other, "graph=uniform,objective=score_entropy", *uniform)
    assert "give model.init_options=parametrisation=mean (logits" in asked
    assert not started("b", other, "graph=uniform,parametrisation=mean", *uniform)
    # What the run has is no claim about the files.
    described = {"model_type": "duo", "model_length": LENGTH}
    (tmp_path / "hf").mkdir()
    there = described_as(described, prefixed("backbone.", published(duo)), tmp_path / "hf")
    assert "set graph.name=uniform" in started("c", there, "")
    both = started("c", there, "graph=absorb")
    assert "(graph.name=uniform), not absorb: use that, and leave model.init_options=graph" in both
    for options, match in (
        ("objective", "model.init_options=objective is not of the form name=value,name=value"),
        ("objective=a,", "model.init_options=objective=a, is not of the form"),
        ("mask-id=x", "model.init_options: argument mask_id: invalid int value: 'x'"),
        ("mask=4", "model.init_options: unrecognized arguments: mask=4"),
    ):
        assert match in started("d", masked, options)
    assert "leave model.init_options=mask_id out" in started("d", tmp_path / "a", "mask_id=4")
    assert main([*words, "--run-dir", str(tmp_path / "d"), "model.init_options=mask_id=4"]) == 2
    assert "model.init_options=mask_id=4 has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["teacher", "teacher.", "state_dict.teacher."])
def test_one_network_of_several_by_its_names(
    mdlm: ScoreModel, sedd: ScoreModel, name: str, tmp_path: Path
) -> None:
    state = {**prefixed("backbone.", published(sedd)), **prefixed("teacher.", published(mdlm))}
    file = written(tmp_path / "x.ckpt", {"state_dict": state})
    assert_same(opened(file, network=name, objective="masked_cross_entropy"), mdlm)


def test_a_width_that_the_tensors_do_not_have_is_said_of_them(
    sedd: ScoreModel, tmp_path: Path
) -> None:
    save_pretrained(sedd, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    config["model"]["hidden_size"] *= 2
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"misshapen: vocab_embed.embedding is \[258, 16\]"):
        opened(tmp_path / "hf")


def test_arrays_of_numpy_are_named(mdlm: ScoreModel, tmp_path: Path) -> None:
    path = tmp_path / "arrays.ckpt"
    arrays = {name: tensor.numpy() for name, tensor in published(mdlm).items()}
    torch.save({"state_dict": arrays}, path)
    with pytest.raises(CheckpointError, match="save arrays of numpy as tensors"):
        opened(path)
