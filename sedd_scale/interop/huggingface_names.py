"""Which tensor of transformers holds which rows of which of our parameters."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.config import Config
from sedd_scale.config.trunk import TrunkShape
from sedd_scale.interop.checkpoint_source import model_shapes
from sedd_scale.interop.sedd_names import VOCABULARY_PARAMETERS


class Held(NamedTuple):
    """What a tensor of theirs holds of ours.

    Attributes:
        ours: the logical name.
        parts: of the rows of queries, keys and values: "q", "k", "v", or "qkv", one under the
            other; "": all rows, in our order.
        turned: whether theirs is [in, out], as GPT-2's are.
    """

    ours: str
    parts: str = ""
    turned: bool = False


_LLAMA = (
    ("input_layernorm", "norm1", ""),
    ("self_attn.q_proj", "attention.linear_qkv", "q"),
    ("self_attn.k_proj", "attention.linear_qkv", "k"),
    ("self_attn.v_proj", "attention.linear_qkv", "v"),
    ("self_attn.q_norm", "attention.q_norm", ""),
    ("self_attn.k_norm", "attention.k_norm", ""),
    ("self_attn.o_proj", "attention.linear_proj", ""),
    ("post_attention_layernorm", "norm2", ""),
    ("mlp.gate_proj", "mlp.linear_fc1.gate", ""),
    ("mlp.up_proj", "mlp.linear_fc1.up", ""),
    ("mlp.down_proj", "mlp.linear_fc2", ""),
)
_GPT2 = (
    ("ln_1", "norm1", ""),
    ("attn.c_attn", "attention.linear_qkv", "qkv"),
    ("attn.c_proj", "attention.linear_proj", ""),
    ("ln_2", "norm2", ""),
    ("mlp.c_fc", "mlp.linear_fc1", ""),
    ("mlp.c_proj", "mlp.linear_fc2", ""),
)
# Before a block's number, the block's modules, and the others.
_LAYERS = {"gpt2": "transformer.h."}
_BLOCKS = {"gpt2": _GPT2}
_OTHERS = {
    "gpt2": (
        ("transformer.wte", "embedding.tokens"),
        ("transformer.wpe", "embedding.positions"),
        ("transformer.ln_f", "head.norm"),
        ("lm_head", "head.linear"),
    ),
}
_LLAMA_OTHERS = (
    ("model.embed_tokens", "embedding.tokens"),
    ("model.norm", "head.norm"),
    ("lm_head", "head.linear"),
)
# What programs saved beside the weights: masks and frequencies, which are computed.
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")
HEAD = "lm_head.weight"


def held_by(kind: str, config: Config) -> dict[str, Held]:
    """What each tensor of a network of that model_type holds, by its name there."""
    shapes = model_shapes(config)
    modules = [(theirs, ours, "") for theirs, ours in _OTHERS.get(kind, _LLAMA_OTHERS)]
    layers = _LAYERS.get(kind, "model.layers.")
    for index in range(config.model.num_layers):
        modules += [
            (f"{layers}{index}.{theirs}", f"blocks.{index}.{ours}", parts)
            for theirs, ours, parts in _BLOCKS.get(kind, _LLAMA)
        ]
    return {
        f"{theirs}.{of}": Held(
            f"{ours}.{of}", parts, kind == "gpt2" and ".linear_" in ours and of == "weight"
        )
        for theirs, ours, parts in modules
        for of in ("weight", "bias")
        if f"{ours}.{of}" in shapes
    }


def their_shape(held: Held, config: Config) -> Shape:
    """Of a tensor of theirs; it has no row of the mask."""
    rows, *others = model_shapes(config)[held.ours]
    rows -= held.ours in VOCABULARY_PARAMETERS
    if held.parts:
        rows = sum(_rows(part, config.trunk) for part in held.parts)
    return (*others, rows) if held.turned else (rows, *others)


def their_rows(held: Held, ours: Tensor, trunk: TrunkShape) -> Tensor:
    """A tensor of theirs, of our whole parameter."""
    found = ours
    if held.ours in VOCABULARY_PARAMETERS:
        found = ours[:-1]
    if held.parts:
        rows = [_view(ours, part, trunk).flatten(0, 2) for part in held.parts]
        found = torch.cat(rows)
    return (found.T if held.turned else found).contiguous()


def our_rows(holders: Mapping[Held, Tensor], shape: Shape, trunk: TrunkShape) -> Tensor:
    """Our whole parameter, float32, of the tensors that hold it; it has no row of the mask."""
    (first, tensor), *others = holders.items()
    if not first.parts:
        assert not others
        return (tensor.T if first.turned else tensor).float()
    whole = torch.empty(shape)
    for held, tensor in holders.items():
        rows = tensor.T if held.turned else tensor
        for part, own in _split(held, rows, trunk):
            view = _view(whole, part, trunk)
            view.copy_(own.reshape(view.shape))
    return whole


def _split(held: Held, rows: Tensor, trunk: TrunkShape) -> Iterator[tuple[str, Tensor]]:
    sizes = [_rows(part, trunk) for part in held.parts]
    return zip(held.parts, rows.split(sizes), strict=True)


def _rows(part: str, trunk: TrunkShape) -> int:
    return (trunk.heads if part == "q" else trunk.kv_heads) * trunk.head_dim


def _view(whole: Tensor, part: str, trunk: TrunkShape) -> Tensor:
    """Rows of queries, keys or values in our joint ones, [kv heads, heads of each, dim, ...]."""
    shared = trunk.heads // trunk.kv_heads
    groups = whole.view(trunk.kv_heads, shared + 2, trunk.head_dim, *whole.shape[1:])
    begin, count = {"q": (0, shared), "k": (shared, 1), "v": (shared + 1, 1)}[part]
    return groups.narrow(1, begin, count)
