"""Logical parameters: names, whole shapes and initial values that know no layout.

A logical name is the same under every tensor, pipeline and data layout ("blocks.7.mlp...."), and so
is the initial value: each parameter is drawn whole from a generator keyed by (seed, name), and each
tensor-parallel rank keeps its slice.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sedd_scale.parallel.layout import Layout


@dataclass(frozen=True)
class LogicalParameter:
    """One logical tensor: this process's shard of it and its place in the whole.

    Attributes:
        name: the layout-free name.
        parameter: what holds the shard, alone or beside those of others (under ZeRO 3 its data may
            be partitioned away).
        local_shape: the shard's shape, padding included.
        shape: the whole tensor's shape, without padding.
        partition_dim: the axis that tensor parallelism splits, or None where ranks hold copies.
        offset: where the shard begins along `partition_dim`.
    """

    name: str
    parameter: nn.Parameter
    local_shape: tuple[int, ...]
    shape: tuple[int, ...]
    partition_dim: int | None
    offset: int
    begin: int = 0
    """Where the shard begins in the flattened parameter."""
    is_copy: bool = False
    """Whether another pipeline stage has it too, and speaks for it."""

    def owned(self, layout: Layout) -> bool:
        """Whether this process speaks for its shard, of which others may hold a copy."""
        return not self.is_copy and layout.owns_copy(split=self.partition_dim is not None)

    @property
    def shard(self) -> torch.Tensor | None:
        """The shard, a view; None where the parameter's data is partitioned away."""
        numel = math.prod(self.local_shape)
        if self.parameter.numel() < self.begin + numel:
            return None
        flat = self.parameter.detach().reshape(-1)
        return flat.narrow(0, self.begin, numel).view(self.local_shape)

    @property
    def valid_length(self) -> int:
        """Entries of the shard along `partition_dim` that are not padding."""
        assert self.partition_dim is not None
        length = self.local_shape[self.partition_dim]
        return max(0, min(length, self.shape[self.partition_dim] - self.offset))

    def slice_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's shard of the whole tensor, padded with zeros to `local_shape`."""
        assert tuple(whole.shape) == self.shape, (self.name, whole.shape, self.shape)
        if self.partition_dim is None:
            return whole
        part = whole.narrow(
            self.partition_dim,
            min(self.offset, self.shape[self.partition_dim]),
            self.valid_length,
        )
        if self.valid_length == self.local_shape[self.partition_dim]:
            return part
        padded = whole.new_zeros(self.local_shape)
        padded.narrow(self.partition_dim, 0, self.valid_length).copy_(part)
        return padded


def logical_parameters(module: nn.Module, layout: Layout) -> Iterator[LogicalParameter]:
    """The parameters of this process's layers with their logical names, in model order.

    Layers carry `logical_name`; a layer with a vocabulary-sized parameter names it in
    `vocab_rows`, a mapping from parameter name to the number of rows that are not padding. A
    parameter that `holds_parts` is one logical parameter a part, LAYER.MODULE.PART.weight.
    """
    seen: set[nn.Parameter] = set()
    for layer in module.modules():
        prefix = getattr(layer, "logical_name", None)
        if prefix is None:
            continue
        vocab_rows: dict[str, int] = getattr(layer, "vocab_rows", {})
        for name, parameter in layer.named_parameters():
            if parameter in seen:  # of an earlier layer, which has a name for it
                continue
            seen.add(parameter)
            rows, *others = getattr(parameter, "ds_shape", parameter.shape)
            split = bool(getattr(parameter, "tensor_model_parallel", False))
            partition_dim = int(parameter.partition_dim) if split else None  # type: ignore[attr-defined]
            parts: dict[str, int] = getattr(parameter, "logical_parts", {"": rows})
            assert sum(parts.values()) == rows, (name, parts)
            begin = 0
            for part, part_rows in parts.items():
                local_shape = (part_rows, *others)
                shape = list(local_shape)
                offset = 0
                if partition_dim is not None:
                    shape[partition_dim] *= layout.tensor
                    offset = local_shape[partition_dim] * layout.tensor_rank
                if name in vocab_rows:
                    shape[0] = vocab_rows[name]
                of_module, _, kind = name.rpartition(".")
                own = f"{prefix}.{of_module}.{part}.{kind}" if part else f"{prefix}.{name}"
                copied = copied_name(parameter)
                yield LogicalParameter(
                    name=copied or own,
                    parameter=parameter,
                    local_shape=local_shape,
                    shape=tuple(shape),
                    partition_dim=partition_dim,
                    offset=offset,
                    begin=begin,
                    is_copy=copied is not None,
                )
                begin += math.prod(local_shape)


def split_over_tensor_ranks(parameter: nn.Parameter, partition_dim: int) -> None:
    """Mark a parameter as split along `partition_dim`, by the attributes Megatron-core reads."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = partition_dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def holds_parts(parameter: nn.Parameter, parts: dict[str, int]) -> None:
    """Mark a parameter as several, one under the other, by their rows on this process."""
    parameter.logical_parts = dict(parts)  # type: ignore[attr-defined]


TOKENS = "embedding.tokens.weight"


def is_copy_of(parameter: nn.Parameter, name: str) -> None:
    """Mark a parameter as another's copy on another pipeline stage, by the other's logical name."""
    parameter.logical_copy = name  # type: ignore[attr-defined]


def copied_name(parameter: torch.Tensor) -> str | None:
    """The logical name of what it is a copy of; None: it is none."""
    return getattr(parameter, "logical_copy", None)


@torch.no_grad()
def initialize_parameters(
    module: nn.Module, layout: Layout, *, seed: int, zero_init: bool, open_gates: bool = False
) -> None:
    """Give every parameter its initial value, the same under every layout.

    Norm weights are one and their biases zero; embedding, weights and biases are
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)), with the embedding's fan-in its width; adaLN modulations and
    the head's linear map are zero when `zero_init` (Lou et al., appendix on architecture;
    adaLN-zero, Peebles and Xie 2023). With
    `open_gates` the biases of blocks' gates are one.
    """
    fan_in = 1
    for logical in logical_parameters(module, layout):
        name = logical.name
        of_module, kind = name.split(".")[-2:]
        if kind == "weight":  # whose bias comes behind it
            fan_in = logical.shape[-1]
        if "norm" in of_module:
            whole = torch.full(logical.shape, float(kind == "weight"))
        elif zero_init and (".modulation." in name or name.startswith("head.linear")):
            whole = torch.zeros(logical.shape)
        else:
            bound = 1.0 / math.sqrt(fan_in)
            key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            whole = torch.empty(logical.shape).uniform_(-bound, bound, generator=generator)
        if open_gates and name.startswith("blocks.") and name.endswith(".modulation.linear.bias"):
            whole.view(2, 3, -1)[:, 2] = 1.0  # shift, scale and gate of either branch
        assert logical.shard is not None
        logical.shard.copy_(logical.slice_of(whole))
