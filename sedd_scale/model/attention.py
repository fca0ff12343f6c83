"""Bidirectional attention: one function, two backends, and the module Megatron-core calls.

L positions, B sequences, h heads of this rank, D head width.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_scale.errors import ConfigError

HALF_TYPES = (torch.bfloat16, torch.float16)


def flash_attention_available(device: torch.device) -> bool:
    """Whether flash-attn is installed and the device can run it."""
    return device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None


def bidirectional_attention(
    query_LBhD: Tensor, key_LBhD: Tensor, value_LBhD: Tensor, *, backend: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all positions, [L, B, h, D].

    Args:
        backend: "flash" (flash-attn), "sdpa" (PyTorch), or "auto": flash-attn where it is
            installed, on a GPU and given half precision, else PyTorch.

    Raises:
        ConfigError: flash-attn is asked for and cannot run here.
    """
    dtype, device = query_LBhD.dtype, query_LBhD.device
    if backend == "auto":
        can_flash = dtype in HALF_TYPES and flash_attention_available(device)
        backend = "flash" if can_flash else "sdpa"
    if backend == "flash":
        if dtype not in HALF_TYPES or not flash_attention_available(device):
            raise ConfigError(
                f"model.attention=flash cannot run on {dtype} tensors on {device}: it needs the "
                "flash-attn package, a GPU and training.precision=bf16; or set model.attention=auto"
            )
        from flash_attn import flash_attn_func

        inputs = (tensor.transpose(0, 1) for tensor in (query_LBhD, key_LBhD, value_LBhD))
        return flash_attn_func(*inputs, causal=False).transpose(0, 1)
    assert backend == "sdpa", backend
    query, key, value = (
        tensor.permute(1, 2, 0, 3) for tensor in (query_LBhD, key_LBhD, value_LBhD)
    )
    return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3)


class BidirectionalAttention(nn.Module):
    """The core attention of Megatron-core's `SelfAttention`: no mask, no dropout."""

    def __init__(self, config: Any, backend: str = "auto", **_: Any) -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **_: Any
    ) -> Tensor:
        """[L, B, h, D] each, to the heads' outputs side by side [L, B, h * D]."""
        assert attention_mask is None
        output = bidirectional_attention(query, key, value, backend=self.backend)
        return output.reshape(*output.shape[:2], -1)
