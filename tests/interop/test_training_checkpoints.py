"""checkpoint.pth and MDLM files: positions become names, nothing is lost, nothing is executed."""

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sedd_scale import load_pretrained
from sedd_scale.errors import CheckpointError
from sedd_scale.interop import FORMATS, foreign_files
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.convert import convert
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.pickled_files import PickledFile
from tests.plain_network import PlainNetwork

VOCAB, WIDTH, BLOCKS, HEADS, COND = 11, 24, 3, 2, 8
SHORT = Assumptions(block_length=6)


def plain_network(seed: int) -> PlainNetwork:
    torch.manual_seed(seed)
    network = PlainNetwork(
        num_states=VOCAB + 1, width=WIDTH, layers=BLOCKS, heads=HEADS, cond_dim=COND
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def training_checkpoint(*, noise_parameter: bool = True) -> tuple[dict[str, Any], PlainNetwork]:
    """What the authors' program saves after three real updates of a small network."""
    network = plain_network(0)
    parameters = list(network.parameters())
    optimized = [*parameters, torch.nn.Parameter(torch.tensor(0.0))] if noise_parameter else None
    optimizer = torch.optim.AdamW(optimized or parameters, lr=1e-3, weight_decay=0.0)
    shadow = [parameter.detach().clone() for parameter in parameters]
    for step in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for average, parameter in zip(shadow, parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - (1 + step) / (10 + step))
    state = dict(network.state_dict())
    state["rotary_emb.inv_freq"] = 10000.0 ** (-torch.arange(0, 12, 2) / 12)
    tree = {
        "model": state,
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadow},
        "optimizer": optimizer.state_dict(),
        "step": 7,
    }
    return tree, network


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("noise_parameter", [True, False])
def test_a_training_checkpoint_survives_both_ways(noise_parameter: bool, tmp_path: Path) -> None:
    tree, network = training_checkpoint(noise_parameter=noise_parameter)
    torch.save(tree, tmp_path / "checkpoint.pth")
    convert(
        "sedd-train", "native", tmp_path / "checkpoint.pth", tmp_path / "run", assumptions=SHORT
    )
    assert (tmp_path / "run" / "checkpoints" / "step-7").is_dir()
    convert("native", "sedd-train", tmp_path / "run", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    # Frequencies are computed, by the published formula.
    torch.testing.assert_close(
        back["model"].pop("rotary_emb.inv_freq"), tree["model"].pop("rotary_emb.inv_freq")
    )
    assert list(back["model"]) == list(tree["model"])
    assert_same(tree, back)
    again = torch.optim.AdamW([*network.parameters()] + [torch.zeros(())] * noise_parameter)
    again.load_state_dict(back["optimizer"])

    # Both kinds of weights are the network's own, run.
    tokens, sigma = torch.randint(VOCAB + 1, (2, 6)), torch.tensor([0.3, 2.0])
    for weights in ("master", "ema"):
        if weights == "ema":
            for parameter, average in zip(network.parameters(), tree["ema"]["shadow_params"]):
                parameter.data.copy_(average)
        logits = network(tokens, sigma)
        rows = torch.arange(12)
        for path in (tmp_path / "run", tmp_path / "checkpoint.pth", tmp_path / "back.pth"):
            model = load_pretrained(
                path, weights=weights, assumptions=SHORT if path.suffix else None
            )
            ours = model.logits(tokens, sigma, rows)
            torch.testing.assert_close(ours, logits.reshape(12, -1), rtol=1e-4, atol=1e-5)


def test_a_state_dict_in_another_order_is_matched_by_shapes(tmp_path: Path) -> None:
    tree, _ = training_checkpoint()
    names = [name for name in tree["model"] if "inv_freq" not in name]
    tree["model"] = {f"module.{name}": tree["model"][name] for name in sorted(tree["model"])}
    order = list(training_order())
    averages = dict(zip(names, tree["ema"]["shadow_params"], strict=True))
    tree["ema"]["shadow_params"] = [averages[name] for name in order]
    tree["optimizer"]["state"] = {}
    torch.save(tree, tmp_path / "checkpoint.pth")
    source = open_checkpoint(tmp_path / "checkpoint.pth", assumptions=SHORT)
    assert torch.equal(source.read("head.linear.bias", "ema"), averages["output_layer.linear.bias"])
    assert torch.equal(
        source.read("blocks.1.mlp.linear_fc1.weight", "ema"), averages["blocks.1.mlp.0.weight"]
    )


def training_order() -> list[str]:
    from sedd_scale.interop.sedd_names import published_names

    return list(published_names(BLOCKS))


class Bomb:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_wrong_training_checkpoints_are_refused_and_nothing_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "checkpoint.pth"

    def refused(change: Any) -> str:
        tree, _ = training_checkpoint()
        change(tree)
        torch.save(tree, file)
        with pytest.raises(CheckpointError) as caught:
            convert("sedd-train", "native", file, tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
        return str(caught.value)

    assert "missing blocks.1.attn_out.weight [24, 24]" in refused(
        lambda tree: tree["model"].pop("blocks.1.attn_out.weight")
    )
    assert "unknown blocks.0.more [2]" in refused(
        lambda tree: tree["model"].update({"blocks.0.more": torch.zeros(2)})
    )
    assert "ema.shadow_params has 39 tensors, the model 40 parameters" in refused(
        lambda tree: tree["ema"]["shadow_params"].pop()
    )
    assert "missing output_layer" in refused(lambda tree: tree["optimizer"]["state"].pop(35))
    assert "missing ema" in refused(lambda tree: tree.pop("ema"))
    # Objects beside the tensors become empty ones: their code is not called.
    tree, _ = training_checkpoint()
    tree["config"] = Bomb()
    torch.save(tree, file)
    capsys.readouterr()
    with contextlib.suppress(CheckpointError):
        open_checkpoint(file, assumptions=SHORT)
    assert "executed" not in capsys.readouterr().out
    file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(file)


class HyperParameters:
    """What Lightning pickles beside the weights."""

    def __init__(self) -> None:
        self.content = {"length": 6}


def scores_of(logits: torch.Tensor) -> torch.Tensor:
    """Log of N times MDLM's probabilities, which leave the mask out."""
    return logits[:, :VOCAB].log_softmax(dim=1) + math.log(VOCAB)


def test_mdlm_checkpoints_become_native(tmp_path: Path) -> None:
    network, average = plain_network(1), plain_network(2)
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    lightning = {
        "state_dict": state | {"metrics.mean": torch.zeros(3)},
        "ema": {
            "decay": 0.99,
            "num_updates": 5,
            "shadow_params": [parameter.detach() for parameter in average.parameters()],
        },
        "hyper_parameters": {"config": HyperParameters()},
    }
    torch.save(lightning, tmp_path / "mdlm.ckpt")
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text('{"model_length": 6, "n_heads": 2}')
    assume = Assumptions(block_length=6, num_heads=HEADS)
    convert("mdlm", "native", tmp_path / "mdlm.ckpt", tmp_path / "a", assumptions=assume)
    convert("mdlm", "native", tmp_path / "hf", tmp_path / "b")
    tokens, rows = torch.randint(VOCAB + 1, (2, 6)), torch.arange(12)
    for path, weights, expected in (
        ("a", "master", network),
        ("a", "ema", average),
        ("b", "ema", network),
    ):
        model = load_pretrained(tmp_path / path, weights=weights)
        assert model.block_length == 6 and not model.time_conditioned
        # Without time conditioning MDLM's networks see sigma 0, whatever it is.
        theirs = expected(tokens, torch.zeros(2)).reshape(12, -1)
        ours = model.logits(tokens, torch.tensor([0.3, 2.0]), rows)
        torch.testing.assert_close(ours[:, :VOCAB], scores_of(theirs), rtol=1e-4, atol=1e-5)
    del state["backbone.output_layer.linear.bias"]
    shutil.rmtree(tmp_path / "b")
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing backbone\.output_layer\.linear\.bias \[12"):
        convert("mdlm", "native", tmp_path / "hf", tmp_path / "b")
    assert not list(tmp_path.glob("b*"))
    assert load_file(tmp_path / "hf" / "model.safetensors")


def test_variants_of_mdlm_are_read_as_what_they_are_or_refused(tmp_path: Path) -> None:
    network = plain_network(3)
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    tokens, sigma, rows = torch.randint(VOCAB + 1, (2, 6)), torch.tensor([0.3, 2.0]), range(12)
    theirs = network(tokens, sigma).reshape(12, -1)
    timed, heads = {"time_conditioning": True}, {"num_heads": HEADS}

    def folder(said: str, tensors: dict[str, torch.Tensor] = state) -> Path:
        made = tmp_path / f"hf-{len(list(tmp_path.glob('hf-*')))}"
        made.mkdir()
        save_file(tensors, made / "model.safetensors")
        (made / "config.json").write_text(said)
        return made

    def refused(match: str, path: Path, **assumptions: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert("mdlm", "native", path, tmp_path / "no", assumptions=Assumptions(**assumptions))
        assert not list(tmp_path.glob("no*"))

    # Conditioned on time, said by the file or by the user; and Duo's graph, all of whose states
    # are tokens.
    told = folder('{"model_length": 6, "n_heads": 2, "time_conditioning": true}')
    for number, (path, said) in enumerate(
        [
            (told, Assumptions()),
            (folder("{}"), Assumptions(block_length=6, **timed, **heads)),
            (folder('{"n_heads": 2}'), Assumptions(graph="uniform")),
        ]
    ):
        target = tmp_path / f"native-{number}"
        convert("mdlm", "native", path, target, assumptions=said)
        model = load_pretrained(target)
        expected_outputs = "mean" if said.graph == "uniform" else "score"
        assert model.time_conditioned
        assert model.config.model.parametrisation == expected_outputs
        assert model.graph.num_tokens == VOCAB + (said.graph == "uniform")
        ours = model.logits(tokens, sigma, torch.tensor(rows))
        expected = theirs if said.graph == "uniform" else scores_of(theirs)
        torch.testing.assert_close(ours[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)
    # Which no other format can say.
    with pytest.raises(CheckpointError, match=r"model\.parametrisation=mean cannot be written"):
        convert("native", "sedd-hf", tmp_path / "native-2", tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"training\.objective=masked_cross_entropy cannot"):
        convert("native", "sedd-hf", tmp_path / "native-0", tmp_path / "no")

    for key in ("cross_attn", "causal"):
        refused(f"config.json says {key}=true, a network", folder(f'{{"{key}": true}}'))
    refused("says n_heads=2, not 3: use that", folder('{"n_heads": 2}'), num_heads=3)
    refused("says time_conditioning=false", folder('{"time_conditioning": false}'), **timed)
    unconditioned = {name: value for name, value in state.items() if "sigma_map" not in name}
    refused(r"missing sigma_map\.mlp\.0\.weight \[C, 256\]", folder("{}", unconditioned))
    others = {"backbone.model.layers.0.mixer.A_log": torch.zeros(3)}
    refused(r"missing vocab_embed\.embedding \[V, H\]", folder("{}", others))
    wrong = state | {"backbone.blocks.1.attn_out.weight": torch.zeros(WIDTH, WIDTH + 1)}
    refused(
        r"misshapen: backbone\.blocks\.1\.attn_out\.weight is \[24, 25\] and should be \[24, 24\]",
        folder('{"n_heads": 2}', wrong),
    )


def test_each_row_names_its_reader() -> None:
    assert [row.source.format for row in FORMATS.values()] == list(FORMATS)


def test_a_pickle_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(training_checkpoint()[0], tmp_path / "checkpoint.pth")
    opened: list[Path] = []

    def counted(path: Path) -> PickledFile:
        opened.append(path)
        return PickledFile(path)

    monkeypatch.setattr(foreign_files, "PickledFile", counted)
    assert open_checkpoint(tmp_path, assumptions=SHORT).format == "sedd-train"
    assert opened == [tmp_path / "checkpoint.pth"]
