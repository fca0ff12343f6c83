"""Gradients after the backward pass: what ZeRO needs to send and read, where DeepSpeed does more.

ZeRO 1 needs each rank to hold the sum of its own partition: a reduce-scatter. DeepSpeed's bf16
optimizer all-reduces the whole gradient instead, after the backward pass; here it travels under it.
With one replica its other optimizer still copies every gradient into buckets and back to reduce it
over itself, joins all of them in a second copy for the update, and for the norm it makes a float64
copy of each.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from sedd_scale.parallel.layout import Layout


def reduce_no_more_than_needed(engine: Any, layout: Layout) -> None:
    """Teach a DeepSpeed engine the shorter way; of ZeRO 3 the norm alone, without a wait."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        partitions = _Bf16Partitions(engine, layout)
        engine.buffered_allreduce_fallback = partitions.reduce
        engine.optimizer.get_grads_for_norm = partitions.for_norm_or_clipping
        engine.optimizer.clear_hp_grads = partitions.forget
        engine.optimizer._update_hp_grad = partitions.add
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        zero = engine.optimizer
        zero.get_grad_norm_direct = functools.partial(_norm_of_partition, zero, layout)
    elif isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        zero = engine.optimizer
        _let_streams_wait(zero)
        zero.get_grad_norm_direct = functools.partial(_norm_of_partition, zero, layout)
        if layout.data == 1:
            zero.buffered_reduce_fallback = lambda *_, **__: None
            if not zero.partition_gradients and not zero.use_grad_accum_attribute:
                flat = _FlatGradients(zero)
                zero.flat_gradients = flat.groups
                zero._get_preflattened_grad_partition = flat.of_group


def _let_streams_wait(zero: Any) -> None:
    """Where DeepSpeed stops the host for its reductions, one stream waits for the other.

    It does so before every bucket's reduction, whose stream waits for the bucket's copies by itself
    and whose bucket is not filled again before (`average_tensor`), and once at the end, when what
    was reduced is read.
    """
    if not zero.overlap_comm:
        return
    from deepspeed.runtime.zero import stage_1_and_2

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


@torch.no_grad()
def _norm_of_partition(
    zero: Any, layout: Layout, gradients: list[Tensor], parameters: list[Tensor]
) -> Tensor:
    """Norm of the whole gradient from each rank's part of it, -1 if that is not finite."""
    held = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    counted = [
        gradient for gradient, parameter in zip(held, parameters) if _is_counted(parameter, layout)
    ]
    squares = _sum_of_squares(counted, layout)
    zero._model_parallel_all_reduce(squares, dist.ReduceOp.SUM)
    norm = squares.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)


def _is_counted(parameter: Tensor, layout: Layout) -> bool:
    """Whether this rank's gradient is in the norm: what is not split every tensor rank holds."""
    return layout.owns_copy(split=getattr(parameter, "tensor_model_parallel", False))


def _sum_of_squares(gradients: list[Tensor], layout: Layout) -> Tensor:
    """Of the parts that data-parallel ranks hold, a scalar in float32."""
    squares = torch.zeros((), device=layout.device)
    if gradients:
        if layout.device.type == "cpu":
            # It adds up float32 squares one after the other, which loses digits in a long row.
            gradients = [piece for part in gradients for piece in part.flatten().split(1 << 16)]
        squares += torch.stack(torch._foreach_norm(gradients)).double().square().sum().float()
    if layout.data > 1:
        dist.all_reduce(squares, group=layout.data_group)
    return squares


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


class _Bf16Partitions:
    """The part of the float32 gradient that this rank updates: added up, reduced and measured.

    A bucket's sum over the data-parallel ranks starts as soon as the last micro-batch has given its
    last gradient, and lies under the rest of the backward pass. Every rank starts them in the same
    order, from the last layers to the first.

    Args:
        engine: with DeepSpeed's `BF16_Optimizer` (ZeRO 1).
    """

    def __init__(self, engine: Any, layout: Layout) -> None:
        optimizer = engine.optimizer
        self.layout = layout
        self._weights: list[list[nn.Parameter]] = optimizer.bf16_groups
        self._sums: list[list[Tensor]] = optimizer.fp32_groups_gradients
        self._whole: list[Tensor] = optimizer.fp32_groups_gradients_flat
        self._mine: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition
        self._times: list[int] = [0 for _ in self._weights]
        self._complete = [len(group) * engine.gradient_accumulation_steps() for group in self._sums]
        self._started: list[Any] = []
        self._counted: list[Tensor] = []
        for parameters, mine in zip(self._weights, self._mine, strict=True):
            for parameter in parameters:
                if parameter._hp_mapping is not None and _is_counted(parameter, layout):
                    place = parameter._hp_mapping.hp_fragment_address
                    self._counted.append(mine.narrow(0, place.start, place.numel))
        self.forget()

    def forget(self) -> None:
        """Begin a step: the first gradient that a weight gets takes the place of what was."""
        self._has = [[False] * len(group) for group in self._sums]
        self._times = [0] * len(self._sums)
        self._started = []

    @torch.no_grad()
    def add(self, weight: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add a bf16 gradient to the float32 one, in one pass, and let its memory go.

        DeepSpeed makes a float32 copy first, and fills the bf16 gradient with zeros for the next
        one to be added to.
        """
        if weight.grad is None:
            return
        total = self._sums[group][index]
        gradient = weight.grad.view(total.shape)
        if self._has[group][index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        self._has[group][index] = True
        weight._hp_grad = total  # type: ignore[attr-defined]
        weight.grad = None
        self._times[group] += 1
        while self._next >= 0 and self._times[self._next] == self._complete[self._next]:
            self._start()

    @property
    def _next(self) -> int:
        return len(self._sums) - 1 - len(self._started)

    def _start(self) -> None:
        """Add up the next bucket over the data-parallel ranks, each its own part."""
        bucket, work = self._next, None
        for has, total in zip(self._has[bucket], self._sums[bucket], strict=True):
            if not has:  # the loss never used the weight
                total.zero_()
        if self.layout.data > 1:
            whole, mine = self._whole[bucket], self._mine[bucket]
            work = dist.reduce_scatter_tensor(
                mine, whole, group=self.layout.data_group, async_op=True
            )
        self._started.append(work)

    @torch.no_grad()
    def reduce(self, *_: Any, **__: Any) -> None:
        """Average this rank's partition over the data-parallel ranks; the rest is left as it is."""
        while self._next >= 0:
            self._start()
        for work, mine in zip(self._started, reversed(self._mine), strict=True):
            if work is not None:
                work.wait()
                mine.div_(self.layout.data)

    @torch.no_grad()
    def for_norm_or_clipping(self, for_clipping: bool = False) -> Any:
        """What DeepSpeed clips, or takes the norm of: one number per rank stands for its gradient.

        The norm of the norm is itself, so DeepSpeed has only the model-parallel ranks to add up.
        """
        if for_clipping:
            return self._mine
        return [_sum_of_squares(self._counted, self.layout).sqrt()], {}
