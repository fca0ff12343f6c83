"""Time embedding and adaptive norms against their formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_scale.config import ModelConfig
from sedd_scale.model.adaln import (
    AdaptiveNorm,
    Modulation,
    SigmaEmbedding,
    sum_gradient,
    sum_gradient_over_sequence,
)
from sedd_scale.parallel.layout import Layout, initialize_layout
from tests.tolerance import float32_bounds

SIGMAS = [0.0, 1e-4, 0.37, 6.9, 20.0]


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sigma_is_embedded_by_cosines_then_sines() -> None:
    torch.manual_seed(0)
    embedding = SigmaEmbedding(24)
    features = torch.tensor(
        [
            [
                wave(sigma * 10_000 ** (-i / 128))
                for wave in (math.cos, math.sin)
                for i in range(128)
            ]
            for sigma in SIGMAS
        ],
        dtype=torch.float64,
    )
    weights = {name: value.detach().double() for name, value in embedding.named_parameters()}
    inner = F.silu(features @ weights["linear1.weight"].t() + weights["linear1.bias"])
    expected = F.silu(inner @ weights["linear2.weight"].t() + weights["linear2.bias"])
    found = embedding(torch.tensor(SIGMAS, dtype=torch.float64))
    # An angle of 20 is known to 20 * 2^-24 = 1e-6.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_angles_are_float32_under_bf16_weights() -> None:
    """sigma = 6.905 and 6.92 are one number in bf16: they must not have one embedding."""
    embedding = SigmaEmbedding(24).to(torch.bfloat16)
    with torch.no_grad():
        embedding.linear1.weight *= 20
        embedding.linear2.weight *= 20
    sigma_B = torch.tensor([6.905, 6.92])
    assert sigma_B.to(torch.bfloat16).unique().numel() == 1
    found = embedding(sigma_B)
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found[0], found[1])


def norm_by_formula(hidden: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean = hidden.mean(-1, keepdim=True)
    variance = (hidden - mean).square().mean(-1, keepdim=True)
    normed = (hidden - mean) / torch.sqrt(variance + 1e-5) * weight
    return normed * (1 + scale) + shift


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_adaptive_norm_is_the_formula(layout: Layout, offset: float) -> None:
    norm = AdaptiveNorm(ModelConfig(hidden_size=16), layout)
    weight, shift, scale = normal(16, seed=1), normal(3, 16, seed=2), normal(3, 16, seed=3)
    with torch.no_grad():
        norm.weight.copy_(weight)
    hidden = (normal(5, 3, 16) + offset).float()
    found, _ = norm(hidden, shift.float(), scale.float())
    inputs = (hidden, norm.weight.detach(), shift.float(), scale.float())
    (bound,) = float32_bounds(lambda *parts: [norm_by_formula(*parts)], *inputs)
    bound.check(found)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_bf16_weights_are_normed_in_float32(layout: Layout, residual: torch.dtype) -> None:
    """One rounding, of the result: every number is within 2^-8 of the formula on bf16 inputs.

    Beside it float32's own roundings, 30 * 2^-24 of numbers near 30: 1e-4 is fifty times that.
    """
    norm = AdaptiveNorm(ModelConfig(hidden_size=16), layout)
    with torch.no_grad():
        norm.weight.copy_(normal(16, seed=1))
    norm.to(torch.bfloat16)
    shift, scale = (normal(3, 16, seed=seed).to(torch.bfloat16) for seed in (2, 3))
    hidden = (normal(5, 3, 16) + 30).to(residual)  # a mean that bf16 would subtract badly
    found, _ = norm(hidden, shift, scale)
    assert found.dtype == torch.bfloat16
    parts = (hidden, norm.weight.detach(), shift, scale)
    expected = norm_by_formula(*(part.double() for part in parts))
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_modulation_gives_its_vectors_in_order(layout: Layout) -> None:
    modulation = Modulation(ModelConfig(hidden_size=5, cond_dim=4), 6, layout).double()
    cond = normal(3, 4)
    vectors = modulation(cond)
    assert [tuple(vector.shape) for vector in vectors] == [(3, 5)] * 6
    expected = cond @ modulation.linear.weight.t() + modulation.linear.bias
    torch.testing.assert_close(torch.cat(vectors, 1), expected, rtol=1e-12, atol=1e-12)


def test_without_sequence_parallelism_nothing_is_summed(layout: Layout) -> None:
    value = normal(3)
    assert sum_gradient_over_sequence(value, layout) is value


def test_a_gradient_with_gaps_is_summed_as_any_other(layout: Layout) -> None:
    """It reaches Megatron-core's sum side by side in memory, where it would not be summed else."""
    value = torch.zeros(3, 4, requires_grad=True)
    seen: list[bool] = []
    copied = sum_gradient(value * 1, layout)
    copied.grad_fn.next_functions[0][0].register_prehook(  # type: ignore[union-attr]
        lambda grads: seen.append(grads[0].is_contiguous())
    )
    copied.sum().backward()  # one number, expanded
    assert seen == [True] and torch.equal(value.grad, torch.ones(3, 4))
