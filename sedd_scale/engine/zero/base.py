"""What is asked of DeepSpeed's optimizers, whichever it is: where state lies, when things happen.

All of DeepSpeed's undocumented names that this program touches in its optimizers are in this
folder, one class an optimizer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from torch import Tensor, nn

from sedd_scale.model.parameters import LogicalParameter, copied_name
from sedd_scale.parallel.layout import Layout


@dataclass(frozen=True)
class Place:
    """Where a range lies: `numel` from `begin` in partition `partition`.

    Attributes:
        start: where the range begins in the flattened parameter, or in a logical one's shard.
    """

    partition: int
    begin: int
    numel: int
    start: int


class Zero(ABC):
    """One of DeepSpeed's optimizers.

    Args:
        engine: a DeepSpeedEngine or PipelineEngine whose optimizer is an `AdamWithEMA`.

    Attributes:
        partitions: this rank's float32 masters, a flat tensor a group of the optimizer.
        adam: the `AdamWithEMA` within.
    """

    partitions: list[Tensor]

    def __init__(self, engine: Any, layout: Layout) -> None:
        self.engine, self.optimizer, self.layout = engine, engine.optimizer, layout
        self.adam = engine.optimizer.optimizer

    @abstractmethod
    def send_less(self) -> None:
        """Let it send and read no more than is needed, and never make the host wait."""

    def before_update(self, judge: Callable[[Tensor], None]) -> None:
        """Between the gradient and the update call `judge` with this rank's part of its square.

        That is a scalar in float64, inf where it is not finite; all ranks' parts add up to the
        square of the whole gradient's norm. The verdict is the judge's alone, who also clips:
        DeepSpeed would wait for the device to give its own.
        """
        for module in (bf16_optimizer, stage_1_and_2, stage3):
            module.is_invalid_grad_norm = lambda norm: False

    def place(self, logical: LogicalParameter) -> Place | None:
        """Where this rank's part of a logical parameter lies; None where it has none."""
        whole = self.place_of(logical.parameter)
        if whole is None:
            return None
        first = max(whole.start, logical.begin)
        end = logical.begin + math.prod(logical.local_shape)
        numel = min(whole.start + whole.numel, end) - first
        if numel <= 0:
            return None
        begin = whole.begin + first - whole.start
        return Place(whole.partition, begin, numel, first - logical.begin)

    def group_of(self, partition: int) -> int:
        """Of the optimizer's groups, whose parameters lie in a partition."""
        return partition

    @abstractmethod
    def place_of(self, parameter: Tensor) -> Place | None:
        """Where this rank's part of a parameter lies; None where it has none."""

    def working_copies(self, logical: LogicalParameter, place: Place) -> list[Tensor]:
        """What this rank computes with in that range, flat, as views."""
        shard = logical.shard
        return [] if shard is None else [shard.view(-1).narrow(0, place.start, place.numel)]

    @abstractmethod
    def link_state(self) -> None:
        """Tell the optimizer of the state that was made in its stead."""

    @abstractmethod
    def refresh(self) -> None:
        """Give the working weights the masters' values; collective over data-parallel ranks."""


class GatheringZero(Zero):
    """Of ZeRO 1 and 2: working weights are whole, flat by groups and gathered after an update.

    Attributes:
        weights: of each group.
        flat_weights: a tensor a group, which the weights are views of.
        module: where it finds the function that gathers.
    """

    weights: list[list[nn.Parameter]]
    flat_weights: list[Tensor]
    module: Any

    def place_of(self, parameter: Tensor) -> Place | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return Place(
            partition=mapping.param_group_index,
            begin=mapping.hp_fragment_address.start,
            numel=mapping.hp_fragment_address.numel,
            start=mapping.lp_fragment_address.start,
        )

    def link_state(self) -> None:
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        self.optimizer.update_lp_params()


def is_counted(parameter: Tensor, layout: Layout) -> bool:
    """Whether this rank's gradient is in the norm: what is not split every tensor rank holds."""
    if copied_name(parameter) is not None:
        return False
    return layout.owns_copy(split=getattr(parameter, "tensor_model_parallel", False))


def sum_of_squares(gradients: list[Tensor], layout: Layout) -> Tensor:
    """A scalar in float32."""
    squares = torch.zeros((), device=layout.device)
    if gradients:
        if layout.device.type == "cpu":
            # It adds up float32 squares one after the other, which loses digits in a long row.
            gradients = [piece for part in gradients for piece in part.flatten().split(1 << 16)]
        squares += torch.stack(torch._foreach_norm(gradients)).double().square().sum().float()
    return squares


@torch.no_grad()
def norm_of_partition(layout: Layout, gradients: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """Norm of this rank's part of the gradient, -1 if that is not finite.

    DeepSpeed asks for it of every group, of which stages may have more or fewer: so no rank waits
    for another here.
    """
    held = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    counted = [
        gradient for gradient, parameter in zip(held, parameters) if is_counted(parameter, layout)
    ]
    norm = sum_of_squares(counted, layout).sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def square_of(norm: Tensor) -> Tensor:
    """In float64, where the square of a float32 is exact; inf for DeepSpeed's -1, not finite."""
    norm = norm.double()
    return torch.where(norm >= 0, norm.square(), math.inf)
