"""ZeRO 1 in bfloat16: float32 gradients that are added up, reduced and measured here.

ZeRO 1 needs each rank to hold the sum of its own partition: a reduce-scatter. DeepSpeed's bf16
optimizer all-reduces the whole gradient instead, after the backward pass; here it travels under it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from torch import Tensor, nn

from sedd_scale.engine.zero.base import GatheringZero, is_counted, sum_of_squares
from sedd_scale.parallel.layout import Layout


class Bf16Zero(GatheringZero):
    """`BF16_Optimizer`: working weights in bf16, gathered from the masters."""

    module = bf16_optimizer

    def __init__(self, engine: Any, layout: Layout) -> None:
        super().__init__(engine, layout)
        zero = self.optimizer
        self.weights, self.flat_weights = zero.bf16_groups, zero.bf16_groups_flat
        self.partitions = zero.fp32_groups_flat_partition

    def send_less(self) -> None:
        zero, gradients = self.optimizer, _Gradients(self.engine, self.layout)
        self.engine.buffered_allreduce_fallback = gradients.reduce
        zero.get_grads_for_norm = gradients.for_norm_or_clipping
        zero.clear_hp_grads = gradients.forget
        zero._update_hp_grad = gradients.add

    def before_update(self, judge: Callable[[Tensor], None]) -> None:
        super().before_update(judge)
        # One number stands for the gradient already.
        bf16_optimizer.get_global_norm_of_tensors = lambda input_tensors, **_: input_tensors[0]
        gradients = self.optimizer.get_grads_for_norm

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            norms, of_experts = gradients(for_clipping)
            judge(torch.stack(norms).double().square().sum())
            return norms, of_experts

        self.optimizer.get_grads_for_norm = get_grads_for_norm


class _Gradients:
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
        # A weight that two stages have is added up over them first, after the backward pass.
        self._waits = layout.pipeline > 1 and bool(engine.module.get_tied_weights_and_groups())
        for parameters, mine in zip(self._weights, self._mine, strict=True):
            for parameter in parameters:
                if parameter._hp_mapping is not None and is_counted(parameter, layout):
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
        while (
            not self._waits
            and self._next >= 0
            and self._times[self._next] == self._complete[self._next]
        ):
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
        return [sum_of_squares(self._counted, self.layout).sqrt()], {}
