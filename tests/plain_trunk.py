"""Other trunks as plain formulas on a dictionary of weights: whole tensors, one process.

Written from the papers of their parts, not from the code under test.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_scale.config import ModelConfig

Weights = Mapping[str, Tensor]


def plain_logits(
    weights: Weights,
    model: ModelConfig,
    tokens_BL: Tensor,
    sigma_B: Tensor,
    *,
    causal: bool = False,
) -> Tensor:
    """Logits [B, L, V] of a network without dropout."""
    x = weights["embedding.tokens.weight"][tokens_BL]
    if model.positions == "learned":
        x = x + weights["embedding.positions.weight"][: tokens_BL.shape[1]]
    cond = None
    if model.conditioning == "adaln":
        index = torch.arange(128, dtype=x.dtype)
        angle = sigma_B.to(x.dtype)[:, None] * 10_000.0 ** (-index / 128)
        cond = torch.cat([angle.cos(), angle.sin()], -1)
        for layer in ("linear1", "linear2"):
            cond = F.silu(_linear(weights, f"embedding.sigma.{layer}", cond))
    for index in range(model.num_layers):
        block = f"blocks.{index}."
        vectors = _vectors(weights, block, cond, 6)
        normed = _norm(weights, model, block + "norm1", x, *vectors[:2])
        x = x + vectors[2] * _attention(weights, model, block + "attention.", normed, causal)
        normed = _norm(weights, model, block + "norm2", x, *vectors[3:5])
        x = x + vectors[5] * _mlp(weights, model, block + "mlp.", normed)
    x = _norm(weights, model, "head.norm", x, *_vectors(weights, "head.", cond, 2))
    of_head = "embedding.tokens.weight" if model.tied_embedding else "head.linear.weight"
    logits = x @ weights[of_head].t()
    return logits + weights["head.linear.bias"] if model.head_bias else logits


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))


def _vectors(weights: Weights, layer: str, cond: Tensor | None, count: int) -> list[Tensor]:
    """Shift, scale and gate, one after the other; of none 0, 0 and 1."""
    if cond is None:
        return [torch.tensor(float(place % 3 == 2)) for place in range(count)]
    vectors = _linear(weights, layer + "modulation.linear", cond)
    return list(vectors[:, None].chunk(count, -1))


def _norm(
    weights: Weights, model: ModelConfig, name: str, x: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    if model.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt()
    x = x * weights[name + ".weight"] + weights.get(name + ".bias", torch.zeros(()))
    return x * (1 + scale) + shift


def _attention(weights: Weights, model: ModelConfig, name: str, x: Tensor, causal: bool) -> Tensor:
    batch, length, _ = x.shape
    groups = model.num_kv_heads or model.num_heads
    each = model.num_heads // groups
    mixed = _linear(weights, name + "linear_qkv", x).view(batch, length, groups, each + 2, -1)
    query, key, value = mixed.split([each, 1, 1], dim=3)
    if model.qk_norm:
        query, key = (
            part
            / (part.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt()
            * weights[f"{name}{of}_norm.weight"]
            for part, of in ((query, "q"), (key, "k"))
        )
    if model.positions == "rotary":
        query, key = (_turned(part, model.rotary_base) for part in (query, key))
    scores = torch.einsum("blgrd,bmgsd->bgrlm", query, key) / math.sqrt(value.shape[-1])
    if causal:
        scores = scores + torch.full((length, length), -torch.inf).triu(1).to(scores)
    output = torch.einsum("bgrlm,bmgsd->blgrd", scores.softmax(-1), value)
    return _linear(weights, name + "linear_proj", output.reshape(batch, length, -1))


def _turned(x_BLGRD: Tensor, base: float) -> Tensor:
    """Entry i of D with entry i + D / 2, as one complex number."""
    length, width = x_BLGRD.shape[1], x_BLGRD.shape[-1]
    frequency = base ** (-torch.arange(0, width, 2, dtype=x_BLGRD.dtype) / width)
    angle = torch.arange(length, dtype=x_BLGRD.dtype)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)[:, None, None]
    number = torch.complex(*x_BLGRD.chunk(2, -1)) * turn
    return torch.cat([number.real, number.imag], -1)


def _mlp(weights: Weights, model: ModelConfig, name: str, x: Tensor) -> Tensor:
    if model.activation == "gelu":
        inner = F.gelu(_linear(weights, name + "linear_fc1", x), approximate="tanh")
    else:
        gate, up = (_linear(weights, f"{name}linear_fc1.{part}", x) for part in ("gate", "up"))
        is_silu = model.activation == "swiglu"
        inner = (F.silu(gate) if is_silu else F.gelu(gate, approximate="tanh")) * up
    return _linear(weights, name + "linear_fc2", inner)
