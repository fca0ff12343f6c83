"""Attention: which positions see which, three backends, and what Megatron-core calls.

L positions, B sequences, h heads of this rank, D head width, E ends of documents. Of keys and
values there may be fewer heads, each shared by as many queries that lie side by side.

Packed documents are given by their ends, ends_BE: exclusive positions, ascending. E is the largest
number of documents in a sequence; the last document ends at L, and shorter lists are filled with L.
The host knows E with the batch: no layer waits for a device to tell.
"""

import contextlib
import functools
import importlib.util
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sedd_scale.errors import ConfigError
from sedd_scale.model.dropout import dropout, entry_bits

# In the place of a layer's dropout, for what all layers share.
_NO_LAYER = -1

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


class AttentionPattern(ABC):
    """Which positions of its sequence a position attends to.

    Made once a pass: what layers ask of it is made by the first that asks.

    Attributes:
        causal: whether none of them comes after it.
        has_documents: whether PyTorch's attention would need a mask.
        needs_mask: whether no other attention can do it.
    """

    has_documents: bool = False
    needs_mask: bool = False

    def __init__(self, *, causal: bool = False) -> None:
        self.causal = causal

    @abstractmethod
    def sdpa(self, query_BhLD: Tensor, key_BhLD: Tensor, value_BhLD: Tensor) -> Tensor:
        """By PyTorch's attention, [B, h, L, D]."""

    def flash(self, query_BLhD: Tensor, key_BLhD: Tensor, value_BLhD: Tensor) -> Tensor:
        """By flash-attn, [B, L, h, D]."""
        raise TypeError(f"{type(self).__name__} needs a mask")

    def varlen(self, query_BLhD: Tensor, key_BLhD: Tensor, value_BLhD: Tensor) -> Tensor:
        """By PyTorch's attention over sequences of several lengths, [B, L, h, D]."""
        raise TypeError(f"{type(self).__name__} is of one length")


def _sdpa(query_BhLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, **how: Any) -> Tensor:
    """PyTorch's attention; h / G queries share a key."""
    shared = query_BhLD.shape[1] != key_BGLD.shape[1]
    return F.scaled_dot_product_attention(
        query_BhLD, key_BGLD, value_BGLD, enable_gqa=shared, **how
    )


class WholeSequence(AttentionPattern):
    """All of the sequence, or all that came before."""

    def sdpa(self, query_BhLD: Tensor, key_BhLD: Tensor, value_BhLD: Tensor) -> Tensor:
        return _sdpa(query_BhLD, key_BhLD, value_BhLD, is_causal=self.causal)

    def flash(self, query_BLhD: Tensor, key_BLhD: Tensor, value_BLhD: Tensor) -> Tensor:
        from flash_attn import flash_attn_func

        output: Tensor = flash_attn_func(query_BLhD, key_BLhD, value_BLhD, causal=self.causal)
        return output


class _Masked(AttentionPattern):
    """A pattern that PyTorch's attention takes as a mask."""

    _mask_B1LL: Tensor | None = None

    @abstractmethod
    def mask(self, length: int) -> Tensor:
        """Which positions [.., L, 1] see which [.., 1, L]: bool [B, 1, L, L]."""

    def sdpa(self, query_BhLD: Tensor, key_BhLD: Tensor, value_BhLD: Tensor) -> Tensor:
        if self._mask_B1LL is None:
            self._mask_B1LL = self.mask(query_BhLD.shape[2])
        return _sdpa(query_BhLD, key_BhLD, value_BhLD, attn_mask=self._mask_B1LL)


class WithinDocuments(_Masked):
    """Those of the same document."""

    has_documents = True

    def __init__(self, ends_BE: Tensor, *, causal: bool = False) -> None:
        super().__init__(causal=causal)
        self.ends_BE = ends_BE
        self._bounds: Tensor | None = None

    def mask(self, length: int) -> Tensor:
        """As `_Masked.mask`."""
        mask_B1LL = _same_document(self.ends_BE, length)
        return mask_B1LL.tril() if self.causal else mask_B1LL

    def flash(self, query_BLhD: Tensor, key_BLhD: Tensor, value_BLhD: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        lengths = self._lengths(query_BLhD)
        flat = (part.flatten(0, 1) for part in (query_BLhD, key_BLhD, value_BLhD))
        output = flash_attn_varlen_func(*flat, *lengths, causal=self.causal)
        return output.view_as(query_BLhD)

    def varlen(self, query_BLhD: Tensor, key_BLhD: Tensor, value_BLhD: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        bounds, _, length, _ = self._lengths(query_BLhD)
        each = query_BLhD.shape[2] // key_BLhD.shape[2]
        if each > 1:  # torch 2.11 takes as many keys as queries alone
            key_BLhD, value_BLhD = (
                part.repeat_interleave(each, 2) for part in (key_BLhD, value_BLhD)
            )
        query, key, value = (part.flatten(0, 1) for part in (query_BLhD, key_BLhD, value_BLhD))
        window = (-1, 0) if self.causal else (-1, -1)
        output = varlen_attn(query, key, value, bounds, bounds, length, length, window_size=window)
        assert isinstance(output, Tensor)
        return output.view_as(query_BLhD)

    def _lengths(self, query_BLhD: Tensor) -> tuple[Tensor, Tensor, int, int]:
        length = query_BLhD.shape[1]
        if self._bounds is None:
            self._bounds = document_bounds(self.ends_BE, length)
        return self._bounds, self._bounds, length, length


class Annealed(_Masked):
    """Those before it, and each of those after it with a chance: between causal and whole.

    Which, is keyed by the sample and both positions, so that every layout and a resume see the
    same; it is the same in all layers. Source: arXiv 2410.17891, section 3.2.

    Args:
        keys_B: of the samples' dropout.
        hidden_B: of 2^32 entries after a position, how many are hidden, int64.
        ends_BE: where documents end, which see nothing of each other; none: [B, 0].
    """

    needs_mask = True

    def __init__(self, keys_B: Tensor, hidden_B: Tensor, ends_BE: Tensor) -> None:
        super().__init__()
        self.keys_B, self.hidden_B, self.ends_BE = keys_B, hidden_B, ends_BE

    def mask(self, length: int) -> Tensor:
        """As `_Masked.mask`."""
        _, *hashes = dropout(
            self.keys_B, length=length, width=length, rate=0.0, site=_NO_LAYER, first_position=0
        )
        seen_LBL = entry_bits(*hashes) >= (self.hidden_B - 2**31)[:, None]
        before_LL = torch.ones(length, length, dtype=torch.bool, device=seen_LBL.device).tril()
        seen_B1LL = (seen_LBL.transpose(0, 1) | before_LL)[:, None]
        if self.ends_BE.numel():
            seen_B1LL = seen_B1LL & _same_document(self.ends_BE, length)
        return seen_B1LL


class Context(NamedTuple):
    """What is known of each sequence besides its tokens."""

    keys_B: Tensor
    """The key of its dropout, int64."""
    pattern: AttentionPattern

    @classmethod
    def unpacked(cls, context_BK: Tensor, *, causal: bool) -> "Context":
        """Of the integers that `packed_context` made."""
        if context_BK.shape[1] % 2 == 0:
            keys_B, hidden_B, ends_BE = context_BK[:, 0], context_BK[:, 1], context_BK[:, 2:]
            return cls(keys_B, Annealed(keys_B, hidden_B, ends_BE))
        keys_B, ends_BE = context_BK[:, 0], context_BK[:, 1:]
        if not ends_BE.numel():
            return cls(keys_B, WholeSequence(causal=causal))
        return cls(keys_B, WithinDocuments(ends_BE, causal=causal))


def packed_context(keys_B: Tensor, ends_BE: Tensor | None, *, hidden: int | None = None) -> Tensor:
    """The integers [B, K] that travel from the host, and between stages.

    Side by side: the key, how much is hidden if anything, the ends of documents if there are any.
    Their number alone tells which, so that nobody waits for a device to know: it is even with what
    is hidden and odd without. Ends of an odd number have the last of them, the block's, once more.

    Args:
        hidden: of 2^32 entries after a position, how many attention does not see while it is
            annealed; None: it is not.
    """
    parts = [keys_B[:, None]]
    if hidden is not None:
        parts.append(torch.full_like(parts[0], hidden))
    if ends_BE is not None:
        parts.append(ends_BE)
        if ends_BE.shape[1] % 2:
            parts.append(ends_BE[:, -1:])
    return torch.cat(parts, dim=1)


def attention(
    query_LBhD: Tensor,
    key_LBhD: Tensor,
    value_LBhD: Tensor,
    *,
    pattern: AttentionPattern | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the positions that the pattern lets see; [L, B, h, D].

    Args:
        pattern: None: every position attends to every other of its sequence.
        backend: "flash" (flash-attn), "sdpa" (PyTorch), or "auto": as `choose_backend` says.

    Raises:
        ConfigError: flash-attn is asked for and cannot run here.
    """
    dtype, device = query_LBhD.dtype, query_LBhD.device
    pattern = pattern or WholeSequence()
    if pattern.needs_mask:
        backend = "sdpa"
    if backend == "auto":
        backend = choose_backend(dtype, device, with_documents=pattern.has_documents)
    inputs = (query_LBhD, key_LBhD, value_LBhD)
    if backend == "sdpa":
        query, key, value = (part.permute(1, 2, 0, 3) for part in inputs)
        with contextlib.nullcontext() if torch.is_grad_enabled() else sdpa_kernel(_OF_ANY_SHAPE):
            return pattern.sdpa(query, key, value).permute(2, 0, 1, 3)
    if backend == "varlen":
        run = pattern.varlen
    elif dtype in HALF_TYPES and flash_attention_available(device):
        run = pattern.flash
    else:
        raise ConfigError(
            f"model.attention=flash cannot run on {dtype} tensors on {device}: it needs the "
            "flash-attn package, a GPU and training.precision=bf16; or set model.attention=auto"
        )
    return run(*(part.transpose(0, 1) for part in inputs)).transpose(0, 1)


def _same_document(ends_BE: Tensor, length: int) -> Tensor:
    """Whether two positions are of one document, bool [B, 1, L, L]."""
    documents_BL = documents_of(ends_BE, length)
    return documents_BL[:, None, :, None] == documents_BL[:, None, None, :]


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


def document_starts(shape: torch.Size, ends_BE: Tensor | None) -> Tensor:
    """The first position of each sequence, and of each document of it: bool [B, L].

    Args:
        ends_BE: None: a sequence is one document.
    """
    starts_BL = torch.zeros(shape, dtype=torch.bool)
    if ends_BE is not None:
        documents_BL = documents_of(ends_BE, shape[1])
        starts_BL = starts_BL.to(ends_BE.device)
        starts_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    starts_BL[:, :1] = True
    return starts_BL


def document_bounds(ends_BE: Tensor, length: int) -> Tensor:
    """Where documents begin in the flattened [B * L] positions, and the end: int32 [B * E + 1].

    Those that a sequence has fewer than another are of no length.
    """
    first_B1 = length * torch.arange(len(ends_BE), device=ends_BE.device)[:, None]
    return F.pad((first_B1 + ends_BE).flatten(), (1, 0)).int()


class CoreAttention(nn.Module):
    """The core attention of Megatron-core's `SelfAttention`, without dropout.

    What Megatron-core passes through as the attention mask is the pattern.

    Attributes:
        cache: keys and values of positions that went before, while a causal network is run a few
            positions at a time.
    """

    def __init__(self, config: Any, backend: str = "auto", **_: Any) -> None:
        super().__init__()
        self.backend = backend
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
        attention_mask: AttentionPattern,
        **_: Any,
    ) -> Tensor:
        """[L, B, h, D] each, to the heads' outputs side by side [L, B, h * D]."""
        if self.cache is not None:
            assert attention_mask.causal and not attention_mask.has_documents
            output = self.cache.attention(query, key, value)
        else:
            output = attention(query, key, value, pattern=attention_mask, backend=self.backend)
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
            output = _sdpa(query, keys, values, attn_mask=None if count == 1 else seen)
        return output.permute(2, 0, 1, 3)
