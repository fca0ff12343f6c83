import gc
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_scale.config import Config, load_config
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning.activations import stage_activations
from tests.model.small_network import noisy_batch
from tests.repository import ROOT

VOCAB_SIZE, BATCH, LENGTH = 60, 2, 64
SELECTIVE = "parallel.recompute_mode=selective"
OTHER = (
    *("model.norm=rmsnorm", "model.num_kv_heads=2", "model.activation=swiglu"),
    *("model.mlp_bias=false", "model.qk_norm=true", "model.ffn_hidden_size=300"),
)
BARE = (*OTHER, "model.conditioning=none", "model.time_conditioning=false")


def storages(things: Iterable[Any]) -> dict[int, int]:
    """Address and bytes of each storage behind the tensors among `things`."""
    # By type alone: to ask some objects that gc finds for their class is to import or to warn. Of
    # subclasses only parameters: a fake tensor that another test left has no storage.
    tensors = [thing for thing in things if type(thing) in (Tensor, torch.nn.Parameter)]
    of_tensors = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in of_tensors}


def config_of(*overrides: str) -> Config:
    sizes = (
        "model.hidden_size=128",
        "model.num_layers=4",
        f"training.micro_batch={BATCH}",
        f"data.block_length={LENGTH}",
    )
    return load_config(ROOT / "configs/runs/tiny.yaml", [*sizes, *overrides])


def predicted(config: Config, *, layers: range, in_flight: int = 1) -> int:
    return stage_activations(
        config,
        vocab_size=VOCAB_SIZE,
        block_length=LENGTH,
        stage=0,
        layers=layers,
        in_flight=in_flight,
    ).kept


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.precision=fp32",),
        ("training.precision=fp32", "model.dropout=0.1"),
        ("training.precision=bf16", "model.dropout=0.1"),
        ("training.precision=bf16", "model.residual_dtype=bf16"),
        ("training.precision=bf16", "parallel.recompute_every=1"),
        ("training.precision=bf16", "parallel.recompute_every=2", "model.dropout=0.1"),
        ("training.precision=bf16", "parallel.recompute_every=3", "model.residual_dtype=bf16"),
        ("training.precision=bf16", "parallel.recompute_every=1", SELECTIVE),
        ("training.precision=fp32", "parallel.recompute_every=2", SELECTIVE, "model.dropout=0.1"),
        ("training.precision=fp32", *OTHER),
        ("training.precision=bf16", *OTHER, "parallel.recompute_every=1", SELECTIVE),
        ("training.precision=bf16", *BARE),
    ],
    ids=" ".join,
)
def test_kept_bytes_are_what_autograd_saves(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    graph = make_graph("absorb", VOCAB_SIZE)
    builders = layer_builders(config, graph, initialize_layout())
    network = ScoreNetwork(builders).train()
    if config.training.precision == "bf16":
        network.bfloat16()
    inputs, targets, _ = noisy_batch(graph, batch=BATCH, length=LENGTH)
    earlier = storages(gc.get_objects())
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(inputs, targets)
    # What recomputation keeps lives in Python objects.
    kept = storages([*saved, *gc.get_objects()])
    gradients = storages(loss.grad_fn.gradients)  # of the loss, part of the workspace
    found = sum(size for at, size in kept.items() if at not in earlier.keys() | gradients.keys())
    expected = predicted(config, layers=range(config.model.num_layers + 2))
    assert expected == pytest.approx(found, rel=0.1)


def test_stages_and_micro_batches_in_flight_add_up() -> None:
    config = config_of()
    whole = predicted(config, layers=range(6))
    assert predicted(config, layers=range(3)) + predicted(config, layers=range(3, 6)) == whole
    assert predicted(config, layers=range(6), in_flight=3) == 3 * whole


def test_sequence_parallelism_splits_all_but_the_heads_input() -> None:
    blocks = range(5)
    alone = predicted(config_of(), layers=blocks)
    tensor = predicted(config_of("parallel.tensor=2"), layers=blocks)
    split = config_of("parallel.tensor=2", "parallel.sequence_parallel=true")
    assert predicted(split, layers=blocks) == alone / 2 < tensor < alone
    head = predicted(split, layers=range(5, 6))
    assert head == BATCH * LENGTH * 128 * (4 / 2 + 4)
