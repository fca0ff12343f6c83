"""Trunks of other norms, activations, heads and positions against plain formulas in float64."""

import math
from typing import Any

import pytest
import torch

from sedd_scale.config import Config
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.rotary import RotaryAngles
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import Layout, initialize_layout
from sedd_scale.planning.parameters import layer_shapes
from tests.model.small_network import small_network
from tests.plain_trunk import plain_logits
from tests.tolerance import GRADIENT, NETWORK

TRUNKS: dict[str, dict[str, Any]] = {
    "as published": {},
    "Llama's": dict(
        norm="rmsnorm",
        num_kv_heads=2,
        activation="swiglu",
        ffn_hidden_size=40,
        mlp_bias=False,
        conditioning="none",
        time_conditioning=False,
        head_bias=False,
    ),
    "Qwen3's, conditioned": dict(
        norm="rmsnorm",
        norm_epsilon=1e-3,
        num_kv_heads=1,
        head_dim=6,
        qk_norm=True,
        activation="swiglu",
        mlp_bias=False,
        tied_embedding=True,
        adaln_gate_init="one",
        rotary_base=100.0,
    ),
    "GPT-2's": dict(
        norm_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        positions="learned",
        max_positions=20,
        conditioning="none",
        time_conditioning=False,
        tied_embedding=True,
        head_bias=False,
    ),
    "everything else": dict(
        norm="rmsnorm",
        norm_bias=True,
        qk_norm=True,
        num_kv_heads=4,
        activation="geglu",
        qkv_bias=True,
        positions="none",
    ),
}


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


@pytest.mark.parametrize("name", TRUNKS)
def test_the_formulas_give_the_same_logits_and_gradients(layout: Layout, name: str) -> None:
    graph = make_graph("absorb", 50)
    network = small_network(graph, layout, scaled=True, **TRUNKS[name])
    model = Config().override(*_overrides(TRUNKS[name])).model
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(51, (3, 12), generator=generator)
    sigma_B = torch.tensor([0.1, 1.0, 5.0])
    weights = {}
    for logical in logical_parameters(network, layout):
        assert logical.shard is not None
        # Biases of norms start at zero, where a mistake with them would not be seen.
        if logical.name.endswith(".bias"):
            logical.shard.add_(0.1 * torch.randn(logical.shape, generator=generator))
        weights[logical.name] = logical.shard.double().clone().requires_grad_()

    hidden_LBH = network.head_input((tokens_BL, sigma_B, torch.zeros(3, dtype=torch.long)))
    linear = network.head.linear
    found_LBV = hidden_LBH @ linear.weight.t()
    found_LBV = found_LBV if linear.bias is None else found_LBV + linear.bias
    expected_BLV = plain_logits(weights, model, tokens_BL, sigma_B)
    error = (found_LBV.transpose(0, 1) - expected_BLV).norm() / expected_BLV.norm()
    assert float(error.detach()) < NETWORK

    direction_BLV = torch.randn(expected_BLV.shape, generator=generator)
    (found_LBV.transpose(0, 1) * direction_BLV).sum().backward()
    (expected_BLV * direction_BLV).sum().backward()
    largest = max(
        float(weight.grad.norm()) for weight in weights.values() if weight.grad is not None
    )
    for logical in logical_parameters(network, layout):
        exact = weights[logical.name].grad
        found = logical.parameter.grad
        assert found is not None and exact is not None, logical.name
        found = found.reshape(-1)[logical.begin :][: math.prod(logical.shape)].view(logical.shape)
        # A bias of all keys has no gradient but roundings of those of its queries.
        error = (found - exact).norm() / max(float(exact.norm()), 1e-4 * largest)
        assert float(error) < GRADIENT, logical.name


@pytest.mark.parametrize("name", TRUNKS)
def test_parameters_are_those_that_the_plan_counts(layout: Layout, name: str) -> None:
    graph = make_graph("absorb", 50)
    network = small_network(graph, layout, scaled=True, **TRUNKS[name])
    config = Config().override(*_overrides(TRUNKS[name]))
    planned = [(p.name, p.shape) for layer in layer_shapes(config, 50) for p in layer]
    assert [(p.name, p.shape) for p in logical_parameters(network, layout)] == planned


def _overrides(trunk: dict[str, Any]) -> list[str]:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "cond_dim": 24} | trunk
    return [f"model.{key}={str(value).lower()}" for key, value in sizes.items()]


@pytest.mark.parametrize("name", ["Llama's", "GPT-2's"])
def test_a_causal_network_goes_on_from_its_cache(layout: Layout, name: str) -> None:
    """Position by position as all at once, with shared heads and with learned positions."""
    overrides = (*_overrides(TRUNKS[name]), "training.objective=autoregressive")
    config = Config().override(*overrides, "model.zero_init=false", "model.vocab_size=50")
    model = ScoreModel(config, 50, layout)
    tokens_BL = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    sigma_B, rows_M = torch.zeros(2), torch.arange(18)
    whole_MH = model.rows(tokens_BL, sigma_B, rows_M).view(2, 9, -1)
    with model.caching(9):
        parts = [
            model.rows(part_BL, sigma_B, torch.arange(part_BL.numel())).view(
                2, part_BL.shape[1], -1
            )
            for part_BL in tokens_BL.split([4, 1, 3, 1], dim=1)
        ]
    error = (torch.cat(parts, 1) - whole_MH).norm() / whole_MH.norm()
    assert float(error) < NETWORK


@pytest.mark.parametrize("name", ["Qwen3's, conditioned"])
def test_open_gates_start_as_the_network_without_conditioning(layout: Layout, name: str) -> None:
    """With modulations at zero, whatever sigma is."""
    graph = make_graph("absorb", 50)
    trunk = {**TRUNKS[name], "zero_init": True, "head_bias": False}
    conditioned = small_network(graph, layout, scaled=True, **trunk)
    bare = {**trunk, "conditioning": "none", "time_conditioning": False, "adaln_gate_init": "zero"}
    plain = small_network(graph, layout, scaled=True, **bare)
    tokens_BL = torch.randint(51, (2, 12), generator=torch.Generator().manual_seed(0))
    found, expected = (
        network.hidden(tokens_BL, torch.tensor([0.1, 5.0])) for network in (conditioned, plain)
    )
    assert float(((found - expected).norm() / expected.norm()).detach()) < NETWORK


def test_slowed_angles() -> None:
    """Fast entries turn as before, slow ones by the factor less, and none beyond either."""
    turn = 10_000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    for scaling, high in (("llama3", 4.0), ("yarn", 32.0)):
        angles = RotaryAngles(10_000.0, scaling, 8.0, 1024, 1.0, high)
        slowed = angles.slowed(turn) / turn
        turns = 1024 / (2 * math.pi * turn)
        torch.testing.assert_close(
            slowed[turns > 1.1 * high * 4], torch.ones_like(slowed[turns > 1.1 * high * 4])
        )
        assert float(slowed[-1]) == pytest.approx(8.0)
        assert bool((slowed.diff() >= -1e-12).all())
    assert torch.equal(RotaryAngles(10_000.0).slowed(turn), turn)
