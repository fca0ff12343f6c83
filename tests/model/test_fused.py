"""Fused passes against the plain formulas and autograd, and as one compiled graph each."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model import compiled, fused
from sedd_scale.model.dropout import dropout, keep_mask
from sedd_scale.model.fused import (
    gated_residual,
    mlp_activation,
    modulated_norm,
    rotated_query_key_value,
)
from sedd_scale.model.rotary import RotaryAngles, rotary_table
from sedd_scale.parallel.layout import initialize_layout
from tests.model.small_network import gradients, noisy_batch, relative, small_network
from tests.tolerance import GRADIENT, float32_bounds

LENGTH, BATCH, WIDTH, HEADS, HEAD_DIM = 5, 3, 8, 2, 6


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def assert_same(
    ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]
) -> None:
    """Values and gradients agree, for a random gradient of the output."""
    found = ours(*inputs)
    grad = numbers(*found.shape, seed=9).detach()

    def definition(*leaves: Tensor) -> list[Tensor]:
        value = plain(*leaves)
        return [value, *torch.autograd.grad(value, leaves, grad.double())]

    parts = [found, *torch.autograd.grad(found, inputs, grad)]
    for part, bound in zip(parts, float32_bounds(definition, *inputs), strict=True):
        assert part.dtype == torch.float32
        bound.check(part)


def test_modulated_norm() -> None:
    hidden, scale, shift = numbers(LENGTH, BATCH, WIDTH), numbers(BATCH, WIDTH), numbers(1, WIDTH)
    assert_same(
        lambda x, m, b: modulated_norm(x, m, b, epsilon=1e-5, dtype=torch.float32)[0],
        lambda x, m, b: F.layer_norm(x, (WIDTH,), eps=1e-5) * m + b,
        [hidden * 3 + 1, scale, shift.expand(BATCH, WIDTH)],
    )


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_modulated_norm_is_taken_in_float32(residual: torch.dtype, weights: torch.dtype) -> None:
    hidden = numbers(LENGTH, BATCH, WIDTH, dtype=residual)
    scale, shift = numbers(BATCH, WIDTH), numbers(BATCH, WIDTH, seed=1)
    found, _ = modulated_norm(hidden, scale, shift, epsilon=1e-5, dtype=weights)
    exact = F.layer_norm(hidden.float(), (WIDTH,), eps=1e-5) * scale + shift
    assert found.dtype == weights
    torch.testing.assert_close(found, exact.to(weights), rtol=1e-2, atol=1e-6)
    found.float().sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == residual


@pytest.mark.parametrize(
    "with_bias, with_dropout", list(itertools.product([False, True], repeat=2))
)
def test_gated_residual(with_bias: bool, with_dropout: bool) -> None:
    drops = dropout(
        torch.arange(BATCH), length=LENGTH, width=WIDTH, rate=0.3, site=1, first_position=2
    )
    keep = keep_mask(*drops)
    inputs = [numbers(LENGTH, BATCH, WIDTH), numbers(LENGTH, BATCH, WIDTH, seed=1)]
    inputs += [numbers(BATCH, WIDTH)] + ([numbers(WIDTH)] if with_bias else [])

    def ours(hidden: Tensor, update: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
        given = drops if with_dropout else None
        return gated_residual(hidden, update, gate, bias_H=bias, dropout=given)

    def plain(hidden: Tensor, update: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
        update = update if bias is None else update + bias
        return hidden + gate * (keep * update / 0.7 if with_dropout else update)

    assert_same(ours, plain, inputs)


def test_the_stream_gets_its_other_gradient_in_the_norms_pass() -> None:
    """hidden + f(norm(hidden)): both gradients of `hidden` arrive as one."""
    hidden, scale, shift = (
        numbers(LENGTH, BATCH, WIDTH),
        numbers(BATCH, WIDTH),
        numbers(BATCH, WIDTH),
    )

    def ours(x: Tensor, m: Tensor, b: Tensor) -> Tensor:
        normed, x = modulated_norm(x, m, b, epsilon=1e-5, dtype=torch.float32)
        return x * 2 + normed.tanh()

    def plain(x: Tensor, m: Tensor, b: Tensor) -> Tensor:
        return x * 2 + (F.layer_norm(x, (WIDTH,), eps=1e-5) * m + b).tanh()

    assert_same(ours, plain, [hidden, scale, shift])
    _, stream = modulated_norm(hidden, scale, shift, epsilon=1e-5, dtype=torch.float32)
    (alone,) = torch.autograd.grad(stream.sum(), hidden)
    assert torch.equal(alone, torch.ones_like(hidden))


@pytest.mark.parametrize("overwrite", [False, True])
def test_bias_gelu(overwrite: bool) -> None:
    inner, bias = numbers(LENGTH, BATCH, WIDTH), numbers(WIDTH)
    assert_same(
        lambda x, b: mlp_activation(x * 1, b, "gelu", overwrite=overwrite),
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        [inner, bias],
    )


def test_rotation_keeps_lengths_and_sees_only_distances() -> None:
    cos, sin = rotary_table(LENGTH, HEAD_DIM, RotaryAngles(1e4), torch.float64, torch.device("cpu"))
    mixed = numbers(1, BATCH, HEADS, 3, HEAD_DIM, dtype=torch.float64)
    query, key, value = rotated_query_key_value(mixed.expand(LENGTH, -1, -1, -1, -1), cos, sin)
    torch.testing.assert_close(query.norm(dim=-1), mixed[..., 0, :].norm(dim=-1).expand(5, -1, -1))
    assert torch.equal(value[3], mixed[0, ..., 2, :])
    products = torch.einsum("lbhd,mbhd->bhlm", query, key)
    for distance in range(-LENGTH + 1, LENGTH):
        diagonal = products.diagonal(distance, dim1=2, dim2=3)
        torch.testing.assert_close(
            diagonal, diagonal[..., :1].expand_as(diagonal), rtol=1e-5, atol=1e-5
        )


def test_rotation_has_the_right_gradient() -> None:
    cos, sin = rotary_table(LENGTH, HEAD_DIM, RotaryAngles(1e4), torch.float64, torch.device("cpu"))
    mixed = numbers(LENGTH, 1, HEADS, 3, HEAD_DIM, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotated_query_key_value(x * 1, cos, sin), mixed)


def test_every_pass_is_one_graph_for_the_compiler() -> None:
    """On a GPU each is compiled whole; here the same capture runs with eager kernels."""
    x = numbers(LENGTH, BATCH, WIDTH).detach()
    scale, shift, bias = numbers(BATCH, WIDTH).detach(), x[0], x[0, 0]
    rate, *hashes = dropout(
        torch.arange(BATCH), length=LENGTH, width=WIDTH, rate=0.3, site=1, first_position=2
    )
    half = x.bfloat16()
    gated = [(given, kept, rate, *hashes) for given in (None, bias) for kept in (False, True)]
    cos, sin = rotary_table(LENGTH, 4, RotaryAngles(1e4), torch.float32, torch.device("cpu"))
    pair = x.view(LENGTH, BATCH, 1, 2, 4)

    def turned(turn: Callable[..., None]) -> Tensor:
        result = torch.empty_like(pair)
        turn(pair, cos, sin, result)
        return result

    cases: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (fused._norm_forward, (x, scale, shift, 1e-5, torch.bfloat16, False, True)),
        (fused._norm_forward, (x, scale, shift, 1e-5, torch.float32, True, True)),
        *((fused._gate_forward, (x, half, scale, *given)) for given in gated),
        (fused._gelu_forward, (x, bias)),
    ]
    for function, arguments in cases:
        plain = function.__wrapped__  # type: ignore[attr-defined]
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), plain(*arguments))
    plain = fused._turn.__wrapped__  # type: ignore[attr-defined]
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(turned(compiled), turned(plain))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_what_a_gpu_makes_again_is_what_a_cpu_keeps(
    precision: torch.dtype, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms from the stream, updates before dropout, sums with their bias: the same gradients."""
    layout, graph = initialize_layout(), make_graph("absorb", 50)
    inputs, targets, _ = noisy_batch(graph)
    found: list[dict[str, Tensor]] = []
    for on_gpu in (False, True):
        monkeypatch.setattr(compiled, "on_gpu", lambda tensor, on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(compiled, "compiles_kernels", lambda: False)
        network = small_network(graph, layout, scaled=True, dropout=rate).to(precision)
        network(inputs, targets).backward()
        found.append(gradients(network, layout))
    tolerance = GRADIENT if precision == torch.float32 else 2**-6
    for name, gradient in found[0].items():
        assert relative(found[1][name], gradient) < tolerance, name
