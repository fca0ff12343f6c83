"""The published checkpoint format: a directory with config.json and model.safetensors.

Its parameter names and its row order of the joint query-key-value matrix differ from ours; each
published tensor corresponds to exactly one of ours and back, and so do gradients.
"""

from typing import Any

import torch
from torch import Tensor

from sedd_scale.config import Config

_EMBEDDING_NAMES = {
    "vocab_embed.embedding": "embedding.tokens.weight",
    "sigma_map.mlp.0.weight": "embedding.sigma.linear1.weight",
    "sigma_map.mlp.0.bias": "embedding.sigma.linear1.bias",
    "sigma_map.mlp.2.weight": "embedding.sigma.linear2.weight",
    "sigma_map.mlp.2.bias": "embedding.sigma.linear2.bias",
}
_HEAD_NAMES = {
    "output_layer.norm_final.weight": "head.norm.weight",
    "output_layer.linear.weight": "head.linear.weight",
    "output_layer.linear.bias": "head.linear.bias",
    "output_layer.adaLN_modulation.weight": "head.modulation.linear.weight",
    "output_layer.adaLN_modulation.bias": "head.modulation.linear.bias",
}
_BLOCK_NAMES = {
    "norm1.weight": "norm1.weight",
    "attn_qkv.weight": "attention.linear_qkv.weight",
    "attn_out.weight": "attention.linear_proj.weight",
    "norm2.weight": "norm2.weight",
    "mlp.0.weight": "mlp.linear_fc1.weight",
    "mlp.0.bias": "mlp.linear_fc1.bias",
    "mlp.2.weight": "mlp.linear_fc2.weight",
    "mlp.2.bias": "mlp.linear_fc2.bias",
    "adaLN_modulation.weight": "modulation.linear.weight",
    "adaLN_modulation.bias": "modulation.linear.bias",
}
VOCABULARY_PARAMETERS = ("embedding.tokens.weight", "head.linear.weight", "head.linear.bias")
_QKV = "attention.linear_qkv.weight"
INV_FREQ = "rotary_emb.inv_freq"
ROTARY_BASE = 10_000.0
# Published models have this ratio and no key for it.
PUBLISHED_MLP_RATIO = 4


def published_names(num_layers: int) -> dict[str, str]:
    """Published name to logical name of every parameter, in the order of the authors' modules."""
    names = dict(_EMBEDDING_NAMES)
    for index in range(num_layers):
        for theirs, ours in _BLOCK_NAMES.items():
            names[f"blocks.{index}.{theirs}"] = f"blocks.{index}.{ours}"
    return names | _HEAD_NAMES


def our_rows(name: str, published: Tensor, num_heads: int, *, mask_id: int | None = None) -> Tensor:
    """A published tensor in the row order of our parameter `name`.

    Args:
        mask_id: state that becomes the last, where it is not; those behind it move up.
    """
    if mask_id is not None and name in VOCABULARY_PARAMETERS:
        before, mask, behind = published.tensor_split([mask_id, mask_id + 1])
        return torch.cat([before, behind, mask])
    return _swapped(published, 3, num_heads) if name.endswith(_QKV) else published


def published_rows(name: str, logical: Tensor, num_heads: int) -> Tensor:
    """Our parameter `name` in the published row order."""
    return _swapped(logical, num_heads, 3) if name.endswith(_QKV) else logical


def rotary_frequencies(head_dim: int) -> Tensor:
    """The buffer `INV_FREQ` of the published format, float32 [head_dim / 2]."""
    even = torch.arange(0, head_dim, 2, dtype=torch.float32)
    return 1.0 / ROTARY_BASE ** (even / head_dim)


def _swapped(weight: Tensor, outer: int, inner: int) -> Tensor:
    """Rows [outer, inner, dim] to [inner, outer, dim]."""
    return weight.view(outer, inner, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def published_config(config: Config, *, num_tokens: int, block_length: int) -> dict[str, Any]:
    """What config.json of the published format says of a model of ours."""
    model = config.model
    return {
        "graph": {"file": "data", "report_all": False, "type": config.graph.name},
        "model": {
            "cond_dim": model.cond_dim,
            "dropout": model.dropout,
            "hidden_size": model.hidden_size,
            "length": block_length,
            "n_blocks": model.num_layers,
            "n_heads": model.num_heads,
            "name": "sedd_scale",
            "scale_by_sigma": config.resolved_scale_by_sigma,
            "type": "ddit",
        },
        "ngpus": 1,
        "noise": {
            "eps": config.noise.eps,
            "sigma_max": config.noise.sigma_max,
            "sigma_min": config.noise.sigma_min,
            "type": config.noise.name,
        },
        "tokens": num_tokens,
    }
