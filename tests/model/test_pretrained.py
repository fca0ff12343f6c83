"""Agreement with the reference program's numbers, and refusal of what is no such checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from sedd_scale import load_pretrained
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.errors import CheckpointError, DataError
from tests.diffusion.reference import log_score_score_entropy, log_scores_from_logits
from tests.plain_network import PlainNetwork
from tests.published import published_gradients
from tests.repository import GOLDEN
from tests.tolerance import GRADIENT, NETWORK, float32_bounds

CASES = ("absorb-loglinear", "uniform-geometric")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / CASES[0], tmp_path / "copy"))


def test_log_scores_losses_and_gradients_are_the_references(case: Path) -> None:
    model = load_pretrained(case)
    golden = load_file(case / "golden.safetensors")
    assert relative(model.log_score(golden["xt"], golden["sigma"]), golden["log_score"]) < NETWORK
    loss_B = model.loss(golden["x0"], t_B=golden["t"], xt_BL=golden["xt"])
    assert relative(loss_B.detach(), golden["loss_per_sequence"]) < NETWORK
    loss_B.mean().backward()
    for name, found in published_gradients(model).items():
        if found.dim() == 1:
            expected = golden.pop(f"grad.{name}")
        else:
            norm = golden.pop(f"grad_norm.{name}").item()
            assert found.double().norm().item() == pytest.approx(norm, rel=GRADIENT), name
            found, expected = found[::8], golden.pop(f"grad_rows.{name}")
        if expected.norm() > 0:
            assert relative(found, expected) < GRADIENT, name
        else:
            assert found.norm() == 0, name
    assert not [name for name in golden if name.startswith("grad")]


def test_float32_explains_less_than_half_of_the_tolerances(case: Path) -> None:
    """Of the plain network on the same weights; the reference's numbers are within their bounds."""
    golden, weights = load_file(case / "golden.safetensors"), load_file(case / "model.safetensors")
    graph = make_graph(case.name.split("-")[0], 50)
    plain = PlainNetwork(num_states=graph.num_states, width=64, layers=2, heads=4, cond_dim=32)
    names = [name for name, _ in plain.named_parameters()]
    sigma_B, rate_B = golden["sigma"].double(), golden["dsigma"].double()
    noise = RowNoise(sigma_B, rate_B, rate_B / torch.expm1(sigma_B))

    def definition(*leaves: torch.Tensor) -> list[torch.Tensor]:
        shown = (golden["xt"], golden["sigma"])
        logits_BLV = functional_call(plain, dict(zip(names, leaves)), shown)
        log_score_BLV = log_scores_from_logits(
            logits_BLV, golden["xt"], sigma_B, graph=graph, scaled=graph.mask_id is not None
        )
        nats_B = log_score_score_entropy(
            log_score_BLV, golden["xt"], golden["x0"], noise, graph=graph
        ).sum(1)
        return [log_score_BLV, nats_B, *torch.autograd.grad(nats_B.mean(), leaves)]

    scores, losses, *gradients = float32_bounds(definition, *(weights[name] for name in names))
    scores.check(golden["log_score"])
    losses.check(golden["loss_per_sequence"])
    assert scores.tells(NETWORK / 2) and losses.tells(NETWORK / 2)
    for name, gradient in zip(names, gradients):
        assert gradient.tells(GRADIENT / 2), name
        if gradient.exact.dim() == 1:
            gradient.check(golden[f"grad.{name}"], name)


def test_pickled_weights_are_read_as_well(tmp_path: Path) -> None:
    source = GOLDEN / CASES[0]
    shutil.copy(source / "config.json", tmp_path)
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    golden = load_file(source / "golden.safetensors")
    found = load_pretrained(tmp_path).log_score(golden["xt"], golden["sigma"])
    assert relative(found, golden["log_score"]) < NETWORK


def test_tokens_of_another_vocabulary_are_refused(case: Path) -> None:
    model = load_pretrained(case)
    states = model.graph.num_states
    with pytest.raises(DataError, match=f"do not fit this model's 0..{states - 1}"):
        model.log_score(torch.full((1, 4), states), torch.ones(1))
    with pytest.raises(DataError, match="do not fit"):
        model.loss(torch.full((1, 4), model.graph.num_tokens))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_pretrained(tmp_path / "nowhere")


def test_a_config_without_a_key_names_it(copy: Path) -> None:
    about = json.loads((copy / "config.json").read_text())
    del about["model"]["n_heads"]
    (copy / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="lacks the key 'n_heads'"):
        load_pretrained(copy)


def test_a_config_that_is_no_json_is_named(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_pretrained(copy)


@pytest.mark.parametrize("length", [0, 100, 10_000])
def test_weights_cut_short_are_damaged(copy: Path, length: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_pretrained(copy)


def test_a_pickle_cut_short_is_damaged(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    path = copy / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_pretrained(copy)


def test_missing_unknown_and_misshapen_tensors_are_named(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    lost = tensors.pop("blocks.1.norm2.weight")
    tensors["blocks.2.norm2.weight"] = lost
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing blocks\.1.*unknown blocks\.2\.norm2"):
        load_pretrained(copy)
    del tensors["blocks.2.norm2.weight"]
    tensors["blocks.1.norm2.weight"] = lost[:-1].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.norm2\.weight is \[63\] and should"):
        load_pretrained(copy)


def test_a_directory_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "golden.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint: .*model\.safetensors, pytorch_model"
    ):
        load_pretrained(copy)
