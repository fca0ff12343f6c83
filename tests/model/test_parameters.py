"""Logical parameters: one name, one shape and one initial value under every layout."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from sedd_scale.config import Config, ModelConfig
from sedd_scale.diffusion.graphs import Absorb
from sedd_scale.interop.sedd_names import published_names
from sedd_scale.model import network as network_module
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.model.parameters import (
    LogicalParameter,
    holds_parts,
    initialize_parameters,
    logical_parameters,
)
from sedd_scale.parallel.layout import Layout, initialize_layout
from tests.model.small_network import small_config
from tests.parallel.vocab_worker import (
    NETWORK_CASES,
    NetworkCase,
    graph_of,
    run_network,
    two_processes,
)

GRAPH = Absorb(50)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return two_processes()


def weights_of(module: nn.Module, layout: Layout) -> dict[str, torch.Tensor]:
    return {p.name: p.parameter.detach() for p in logical_parameters(module, layout)}


@pytest.mark.parametrize("case", NETWORK_CASES, ids=str)
def test_names_shapes_and_initial_values_know_no_tensor_parallelism(
    case: NetworkCase, layout: Layout, ranks: list[dict[str, Any]]
) -> None:
    alone = run_network(dataclasses.replace(case, sequence_parallel=False), layout)
    states = graph_of(case.name, case.num_tokens).num_states
    found = [rank["networks"][case] for rank in ranks]
    assert list(alone["places"]) == list(found[0]["places"]) == list(found[1]["places"])
    num_split = 0
    for name, (shape, _, _) in alone["places"].items():
        assert alone["weights"][name].shape == shape
        places = [part["places"][name] for part in found]
        assert places[0][:2] == places[1][:2] and places[0][0] == shape
        dim = places[0][1]
        parts = [part["weights"][name] for part in found]
        if dim is None:
            assert torch.equal(parts[0], parts[1])
            whole = parts[0]
        else:
            num_split += 1
            assert [place[2] for place in places] == [0, parts[0].shape[dim]]
            joined = torch.cat(parts, dim)
            whole = joined.narrow(dim, 0, shape[dim])
            assert not joined.narrow(dim, shape[dim], joined.shape[dim] - shape[dim]).any()
            if name in ("embedding.tokens.weight", "head.linear.weight", "head.linear.bias"):
                assert len(whole) == states and len(joined) == states + states % 2
        assert torch.equal(whole, alone["weights"][name]), name
    # Embedding; head's weight and bias; of each block qkv, projection, fc1 with its bias, fc2.
    assert num_split == 3 + 2 * 5


def test_a_layer_built_alone_starts_as_in_the_whole_network(layout: Layout) -> None:
    """As a pipeline stage builds it, in whatever order and after whatever other draws."""
    config = small_config(GRAPH, scaled=True, seed=11)
    whole = weights_of(ScoreNetwork(layer_builders(config, GRAPH, layout)), layout)
    seen = set()
    builders = layer_builders(config, GRAPH, layout)
    assert len(builders) == 4
    for builder in reversed(builders):
        torch.rand(7)
        for name, weight in weights_of(builder(), layout).items():
            assert torch.equal(weight, whole[name]), name
            seen.add(name)
    assert seen == whole.keys() == set(published_names(2).values())


def test_initial_values_have_their_law_and_their_seed(layout: Layout) -> None:
    def built(seed: int, **changes: object) -> dict[str, torch.Tensor]:
        config = small_config(GRAPH, scaled=True, seed=seed, **changes)
        return weights_of(ScoreNetwork(layer_builders(config, GRAPH, layout)), layout)

    first, other, zero = built(0), built(1), built(0, zero_init=True)
    drawn = {name: value for name, value in first.items() if ".norm" not in name}
    for name, value in first.items():
        if name not in drawn:
            assert (value == 1).all(), name
        elif ".modulation." in name or name.startswith("head.linear"):
            assert not zero[name].any(), name
        else:
            assert torch.equal(zero[name], value), name
    for name, value in drawn.items():
        assert not torch.equal(value, other[name]), name
        fan_in = first[name.replace(".bias", ".weight")].shape[-1]
        bound = 1 / math.sqrt(fan_in)
        assert value.abs().max() <= bound, name
        # Of a uniform law on [-b, b]: mean 0 and mean square b^2 / 3, within 5 standard errors.
        count = value.numel()
        assert abs(value.mean()) < 5 * bound / math.sqrt(3 * count), name
        square_error = abs(value.square().mean() - bound**2 / 3)
        assert square_error < 5 * bound**2 * math.sqrt(4 / 45 / count), name
    one, two = first["blocks.0.mlp.linear_fc1.weight"], first["blocks.1.mlp.linear_fc1.weight"]
    assert not torch.equal(one, two)


def test_shards_are_slices_padded_with_zeros() -> None:
    whole = torch.arange(1.0, 16.0).view(5, 3)
    expected = {0: whole[:2], 1: whole[2:4], 2: torch.cat([whole[4:], torch.zeros(1, 3)]),
                3: torch.zeros(2, 3)}  # fmt: skip
    lengths = []
    for rank, shard in expected.items():
        parameter = LogicalParameter(
            name="x",
            parameter=nn.Parameter(torch.empty(2, 3)),
            local_shape=(2, 3),
            shape=(5, 3),
            partition_dim=0,
            offset=2 * rank,
        )
        assert torch.equal(parameter.slice_of(whole), shard)
        lengths.append(parameter.valid_length)
    assert lengths == [2, 2, 1, 0]

    columns = LogicalParameter("x", nn.Parameter(torch.empty(5, 2)), (5, 2), (5, 3), 1, 2)
    assert torch.equal(columns.slice_of(whole), torch.cat([whole[:, 2:], torch.zeros(5, 1)], dim=1))
    copy = LogicalParameter("x", nn.Parameter(torch.empty(5, 3)), (5, 3), (5, 3), None, 0)
    assert torch.equal(copy.slice_of(whole), whole)


@pytest.mark.parametrize(
    ("sizes", "num_tensors", "num_parameters"),
    [
        ({}, 130, 169_627_218),
        ({"hidden_size": 1024, "num_layers": 24, "num_heads": 16}, 250, 424_477_010),
    ],
    ids=["small", "medium"],
)
def test_published_sizes_have_their_number_of_parameters(
    layout: Layout,
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, int],
    num_tensors: int,
    num_parameters: int,
) -> None:
    """Shapes alone: nothing is allocated or drawn. (The published files hold a buffer besides.)"""
    monkeypatch.setattr(network_module, "initialize_parameters", lambda *_, **__: None)
    with torch.device("meta"):
        config = Config(model=ModelConfig(**sizes))  # type: ignore[arg-type]
        network = ScoreNetwork(layer_builders(config, Absorb(50_257), layout))
    parameters = list(logical_parameters(network, layout))
    assert all(p.parameter.is_meta for p in parameters)
    assert len(parameters) == num_tensors
    assert sum(math.prod(p.shape) for p in parameters) == num_parameters


def test_parts_of_a_parameter_are_parameters_of_their_own(layout: Layout) -> None:
    """Each with its name, its place and the initial value that it would have alone."""
    layer = nn.Module()
    layer.logical_name = "blocks.0"
    layer.up = nn.Linear(4, 6)
    for parameter in layer.up.parameters():
        holds_parts(parameter, {"gate": 2, "inner": 4})
    initialize_parameters(layer, layout, seed=3, zero_init=False)
    found = {logical.name: logical for logical in logical_parameters(layer, layout)}
    assert [(name, part.shape, part.begin) for name, part in found.items()] == [
        ("blocks.0.up.gate.weight", (2, 4), 0),
        ("blocks.0.up.inner.weight", (4, 4), 8),
        ("blocks.0.up.gate.bias", (2,), 0),
        ("blocks.0.up.inner.bias", (4,), 2),
    ]
    shards = [found[f"blocks.0.up.{part}.weight"].shard for part in ("gate", "inner")]
    assert torch.equal(torch.cat(shards), layer.up.weight)  # type: ignore[arg-type]
    alone = nn.Module()
    alone.logical_name = "blocks.0.up"
    alone.gate = nn.Linear(4, 2)
    initialize_parameters(alone, layout, seed=3, zero_init=False)
    assert torch.equal(alone.gate.weight, layer.up.weight[:2])
    assert torch.equal(alone.gate.bias, layer.up.bias[:2])
