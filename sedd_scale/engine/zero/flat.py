"""ZeRO 1 in float32 and ZeRO 2: gradients that DeepSpeed reduces in buckets, less what is too much.

With one replica it copies every gradient into buckets and back to reduce it over itself, joins all
of them in a second copy for the update, and for the norm it makes a float64 copy of each.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor

from sedd_scale.engine.zero.base import GatheringZero, norm_of_partition, square_of
from sedd_scale.parallel.layout import Layout


class FlatZero(GatheringZero):
    """`DeepSpeedZeroOptimizer`: a copy of the masters to work with, gathered."""

    module = stage_1_and_2

    def __init__(self, engine: Any, layout: Layout) -> None:
        super().__init__(engine, layout)
        zero = self.optimizer
        self.weights, self.flat_weights = zero.bit16_groups, zero.bit16_groups_flat
        self.partitions = zero.single_partition_of_fp32_groups

    def send_less(self) -> None:
        zero = self.optimizer
        _let_streams_wait(zero)
        zero.get_grad_norm_direct = functools.partial(norm_of_partition, self.layout)
        if self.layout.data == 1:
            zero.buffered_reduce_fallback = lambda *_, **__: None
            if not zero.partition_gradients and not zero.use_grad_accum_attribute:
                flat = _FlatGradients(zero)
                zero.flat_gradients = flat.groups
                zero._get_preflattened_grad_partition = flat.of_group

    def before_update(self, judge: Callable[[Tensor], None]) -> None:
        super().before_update(judge)
        # With bf16 it would search all gradients for what the norm tells anyway.
        self.optimizer.check_grad_overflow = False
        norm_of_gradient = self.optimizer.scaled_global_norm

        def scaled_global_norm(*args: Any, **kwargs: Any) -> Tensor:
            norm: Tensor = norm_of_gradient(*args, **kwargs)
            judge(square_of(norm))
            return norm

        self.optimizer.scaled_global_norm = scaled_global_norm


def _let_streams_wait(zero: Any) -> None:
    """Where DeepSpeed stops the host for its reductions, one stream waits for the other.

    It does so before every bucket's reduction, whose stream waits for the bucket's copies by itself
    and whose bucket is not filled again before (`average_tensor`), and once at the end, when what
    was reduced is read.
    """
    if not zero.overlap_comm:
        return
    accelerator = stage_1_and_2.get_accelerator()
    if not isinstance(accelerator, _QuietAccelerator):
        quiet = _QuietAccelerator(accelerator)
        stage_1_and_2.get_accelerator = lambda: quiet
    epilogue = zero.independent_gradient_partition_epilogue

    def independent_gradient_partition_epilogue() -> None:
        accelerator = stage_1_and_2.get_accelerator()
        accelerator.at_synchronize = lambda: accelerator.current_stream().wait_stream(
            zero.reduction_stream
        )
        try:
            epilogue()
        finally:
            accelerator.at_synchronize = lambda: None

    zero.independent_gradient_partition_epilogue = independent_gradient_partition_epilogue


class _QuietAccelerator:
    """DeepSpeed's accelerator, but that no one of this module waits for the whole device."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.at_synchronize: Callable[[], None] = lambda: None

    def synchronize(self, *_: Any) -> None:
        self.at_synchronize()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


class _FlatGradients:
    """One replica's gradients under ZeRO 1 in float32: views of the flat tensor AdamW reads.

    A weight's first gradient of a step moves to its place as soon as it is made, and those of later
    micro-batches are added to it there; so no second copy is made, and the flat tensor's memory is
    kept from step to step.

    Args:
        zero: DeepSpeed's optimizer of ZeRO 1, whose gradients are of the weights' own type.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.groups: list[Tensor] = []
        for weights, partition in zip(
            zero.params_in_partition, zero.single_partition_of_fp32_groups, strict=True
        ):
            flat = torch.zeros_like(partition, requires_grad=False)
            self.groups.append(flat)
            start = 0
            for weight in weights:
                place = flat.narrow(0, start, weight.numel()).view_as(weight)
                weight.register_post_accumulate_grad_hook(functools.partial(_move_to, place))
                start += weight.numel()

    @torch.no_grad()
    def of_group(self, index: int) -> Tensor:
        """The whole gradient of a parameter group, padding included, in DeepSpeed's order."""
        flat, start = self.groups[index], 0
        for gradient in self._zero.averaged_gradients[index]:
            place = flat.narrow(0, start, gradient.numel())
            if gradient.data_ptr() != place.data_ptr():  # padding, or a weight the loss never used
                place.copy_(gradient.flatten())
            start += gradient.numel()
        return flat


@torch.no_grad()
def _move_to(place: Tensor, weight: Tensor) -> None:
    """Let `place` hold the gradient that autograd has just made for a weight."""
    if weight.grad is not None and weight.grad is not place:
        place.copy_(weight.grad)
        weight.grad = place
