"""Attention, bidirectional or causal: one function, three backends, and what Megatron-core calls.

L positions, B sequences, h heads of this rank, D head width, E ends of documents.

Packed documents are given by their ends, ends_BE: exclusive positions, ascending. E is the largest
number of documents in a sequence; the last document ends at L, and shorter lists are filled with L.
The host knows E with the batch: no layer waits for a device to tell.
"""

import contextlib
import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sedd_scale.errors import ConfigError

HALF_TYPES = (torch.bfloat16, torch.float16)
# cuDNN builds a graph for every new shape, some 30 ms of the host each: for training alone, whose
# shapes stay.
_OF_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@functools.cache
def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def flash_attention_available(device: torch.device) -> bool:
    """Whether flash-attn is installed and the device can run it.

    Raises:
        ConfigError: it is installed and does not import, as when built for another torch.
    """
    return device.type == "cuda" and is_installed("flash_attn") and _flash_attn_imports()


@functools.cache
def _flash_attn_imports() -> bool:
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"flash-attn is installed but does not import with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}): build it for this torch, remove it, or set "
            "model.attention=sdpa"
        ) from error
    return True


@functools.cache
def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def choose_backend(dtype: torch.dtype, device: torch.device, *, with_documents: bool) -> str:
    """The fastest of "flash", "varlen" and "sdpa" that runs here.

    With documents, whose mask PyTorch's attention would read whole: flash-attn, or PyTorch's own
    kernel for sequences of several lengths. Without: PyTorch from Hopper on, whose cuDNN attention
    is ahead of flash-attn 2 there, and flash-attn on older devices.
    """
    if device.type != "cuda" or dtype not in HALF_TYPES:
        return "sdpa"
    if with_documents:
        return "flash" if flash_attention_available(device) else "varlen"
    older = _major_capability(device) < 9
    return "flash" if older and flash_attention_available(device) else "sdpa"


def attention(
    query_LBhD: Tensor,
    key_LBhD: Tensor,
    value_LBhD: Tensor,
    *,
    ends_BE: Tensor | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over all positions, or those of the same document; [L, B, h, D].

    Args:
        ends_BE: where each sequence's documents end; None: every position attends to every other of
            its sequence.
        causal: a position attends to itself and those before it only.
        backend: "flash" (flash-attn), "sdpa" (PyTorch), or "auto": as `choose_backend` says.

    Raises:
        ConfigError: flash-attn is asked for and cannot run here.
    """
    dtype, device = query_LBhD.dtype, query_LBhD.device
    if backend == "auto":
        backend = choose_backend(dtype, device, with_documents=ends_BE is not None)
    if backend == "varlen":
        assert ends_BE is not None
        return _document_attention(query_LBhD, key_LBhD, value_LBhD, ends_BE, causal)
    if backend == "flash":
        if dtype not in HALF_TYPES or not flash_attention_available(device):
            raise ConfigError(
                f"model.attention=flash cannot run on {dtype} tensors on {device}: it needs the "
                "flash-attn package, a GPU and training.precision=bf16; or set model.attention=auto"
            )
        return _flash_attention(query_LBhD, key_LBhD, value_LBhD, ends_BE, causal)
    assert backend == "sdpa", backend
    query, key, value = (
        tensor.permute(1, 2, 0, 3) for tensor in (query_LBhD, key_LBhD, value_LBhD)
    )
    mask = None
    if ends_BE is not None:
        documents_BL = documents_of(ends_BE, len(query_LBhD))
        mask = documents_BL[:, None, :, None] == documents_BL[:, None, None, :]
        if causal:
            mask = mask.tril()
    with contextlib.nullcontext() if torch.is_grad_enabled() else sdpa_kernel(_OF_ANY_SHAPE):
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal and mask is None
        )
    return output.permute(2, 0, 1, 3)


def _document_attention(
    query_LBhD: Tensor, key_LBhD: Tensor, value_LBhD: Tensor, ends_BE: Tensor, causal: bool
) -> Tensor:
    """PyTorch's attention over sequences of several lengths, laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    length, batch = query_LBhD.shape[:2]
    bounds = document_bounds(ends_BE, length)
    query, key, value = (
        tensor.transpose(0, 1).flatten(0, 1) for tensor in (query_LBhD, key_LBhD, value_LBhD)
    )
    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(query, key, value, bounds, bounds, length, length, window_size=window)
    assert isinstance(output, Tensor)
    return output.unflatten(0, (batch, length)).transpose(0, 1)


def _flash_attention(
    query_LBhD: Tensor,
    key_LBhD: Tensor,
    value_LBhD: Tensor,
    ends_BE: Tensor | None,
    causal: bool,
) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    inputs = [tensor.transpose(0, 1) for tensor in (query_LBhD, key_LBhD, value_LBhD)]
    if ends_BE is None:
        return flash_attn_func(*inputs, causal=causal).transpose(0, 1)
    batch, length = inputs[0].shape[:2]
    bounds = document_bounds(ends_BE, length)
    output = flash_attn_varlen_func(
        *(tensor.flatten(0, 1) for tensor in inputs), bounds, bounds, length, length, causal=causal
    )
    return output.unflatten(0, (batch, length)).transpose(0, 1)


def document_ends(clean_BL: Tensor, eos_id: int) -> Tensor:
    """Where the documents of each sequence end, int64 [B, E]: after an EOS, and with the block."""
    length = clean_BL.shape[1]
    place_L = torch.arange(1, length + 1, device=clean_BL.device)
    ends_BL = torch.where(clean_BL == eos_id, place_L, length).sort(dim=1).values
    most = int((ends_BL < length).sum(dim=1).max()) + 1 if ends_BL.numel() else 1
    return ends_BL[:, :most].contiguous()


def documents_of(ends_BE: Tensor, length: int) -> Tensor:
    """The document of each position, counted from 0 in its sequence, int64 [B, L]."""
    place_L = torch.arange(length, device=ends_BE.device)
    place_BL = place_L.expand(len(ends_BE), -1).contiguous()
    return torch.searchsorted(ends_BE.contiguous(), place_BL, right=True)


def document_bounds(ends_BE: Tensor, length: int) -> Tensor:
    """Where documents begin in the flattened [B * L] positions, and the end: int32 [B * E + 1].

    Those that a sequence has fewer than another are of no length.
    """
    first_B1 = length * torch.arange(len(ends_BE), device=ends_BE.device)[:, None]
    return F.pad((first_B1 + ends_BE).flatten(), (1, 0)).int()


class CoreAttention(nn.Module):
    """The core attention of Megatron-core's `SelfAttention`, without dropout.

    What Megatron-core passes through as the attention mask is where documents end.

    Attributes:
        cache: keys and values of positions that went before, while a causal network is run a few
            positions at a time.
    """

    def __init__(
        self, config: Any, backend: str = "auto", *, causal: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.backend = backend
        self.causal = causal
        self.cache: KeyValueCache | None = None

    def places(self, count: int) -> tuple[int, int]:
        """The position of the first of the `count` given next, and how many there may ever be."""
        if self.cache is None:
            return 0, count
        return self.cache.length, self.cache.capacity

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """[L, B, h, D] each, to the heads' outputs side by side [L, B, h * D]."""
        if self.cache is not None:
            assert self.causal and attention_mask is None
            output = self.cache.attention(query, key, value)
        else:
            output = attention(
                query,
                key,
                value,
                ends_BE=attention_mask,
                causal=self.causal,
                backend=self.backend,
            )
        return output.reshape(*output.shape[:2], -1)


class KeyValueCache:
    """Keys and values of the first positions of a batch, for causal attention; no gradient.

    Attributes:
        length: positions it holds.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._pair_2BhLD: Tensor | None = None

    def attention(self, query_nBhD: Tensor, key_nBhD: Tensor, value_nBhD: Tensor) -> Tensor:
        """Outputs [n, B, h, D] of the next n positions, which are kept."""
        query, key, value = (
            tensor.permute(1, 2, 0, 3) for tensor in (query_nBhD, key_nBhD, value_nBhD)
        )
        batch, heads, count, width = key.shape
        if self._pair_2BhLD is None:
            self._pair_2BhLD = key.new_empty(2, batch, heads, self.capacity, width)
        end = self.length + count
        assert end <= self.capacity, (end, self.capacity)
        self._pair_2BhLD[:, :, :, self.length : end] = torch.stack([key, value])
        keys, values = self._pair_2BhLD[:, :, :, :end]
        # The last position sees all that is there, the one before it one less, ...
        seen = torch.ones(count, end, dtype=torch.bool, device=key.device).tril(self.length)
        self.length = end
        with sdpa_kernel(_OF_ANY_SHAPE):
            output = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=None if count == 1 else seen
            )
        return output.permute(2, 0, 1, 3)
