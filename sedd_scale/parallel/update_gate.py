"""The moment before the weights change: all ranks know the step's numbers and agree to go on.

DeepSpeed takes the norm of the whole gradient at the start of its optimizer step and leaves the
update out where that is not finite. This gate stands at that place. One all-reduce of three numbers
gives every rank the loss, the gradient norm and whether any rank wants to stop, in place of the
loss's own all-reduce; the host reads them once, where DeepSpeed would wait for the norm anyway.
Then the update is made or left out, by the same rule on all ranks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.parallel.layout import Layout


class StepNumbers(NamedTuple):
    """What all ranks know of a step before its update."""

    loss: float
    """Mean score entropy over the global batch, nats per token."""
    grad_norm: float
    """Euclidean norm of the whole gradient before clipping; inf where that is not finite."""
    wants_stop: bool
    """Whether any rank wanted to stop."""


class UpdateGate:
    """Asks, between the gradient and the update, whether the update is to be made.

    Args:
        engine: a DeepSpeedEngine or PipelineEngine, after `reduce_no_more_than_needed`.
        loss_part: this rank's part of the mean loss of the global batch, a scalar: all ranks' parts
            add up to it.

    Attributes:
        loss_part: as given.
        accept: judges a step's numbers; has to answer alike on all ranks.
        wants_stop: whether this rank wants to stop.
        numbers: of the step made last.
        accepted: whether its update was made.
    """

    def __init__(self, engine: Any, layout: Layout, loss_part: Callable[[], Tensor]) -> None:
        # Imported here, as the engine must choose DeepSpeed's device before its first import.
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self.accept: Callable[[StepNumbers], bool] = are_finite
        self.wants_stop: Callable[[], bool] = lambda: False
        self.numbers = StepNumbers(math.nan, math.nan, False)
        self.accepted = False
        self._layout = layout
        self.loss_part = loss_part
        zero = engine.optimizer
        if isinstance(zero, BF16_Optimizer):
            self._guard_bf16(zero)
        elif isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            self._guard_stage_3(zero)
        else:
            assert isinstance(zero, DeepSpeedZeroOptimizer), type(zero)
            self._guard_stages_1_and_2(zero)

    def _guard_bf16(self, zero: Any) -> None:
        gradients = zero.get_grads_for_norm

        def for_norm_or_clipping(for_clipping: bool = False) -> Any:
            if for_clipping:
                return gradients(for_clipping=True)
            norms, of_experts = gradients()
            # Of this stage and tensor rank alone, and the same on its data-parallel ranks.
            square = torch.stack(norms).double().square().sum()
            if not self._opens(square, counts=self._layout.data_rank == 0):
                norms = [torch.full_like(norms[0], math.inf)]
            return norms, of_experts

        zero.get_grads_for_norm = for_norm_or_clipping

    def _guard_stages_1_and_2(self, zero: Any) -> None:
        norm_of_gradient = zero.scaled_global_norm

        def scaled_global_norm(*args: Any, **kwargs: Any) -> Tensor:
            norm: Tensor = norm_of_gradient(*args, **kwargs)
            opens = self._opens(_square(norm), counts=self._layout.rank == 0)
            # With bf16 DeepSpeed heeds the norm only where it checks for overflow; its own check,
            # at the start of its step, would search all gradients for what the norm tells anyway.
            zero.check_grad_overflow = not opens
            return norm if opens else torch.full_like(norm, math.inf)

        take_step = zero.step

        def step(*args: Any, **kwargs: Any) -> Any:
            zero.check_grad_overflow = False
            return take_step(*args, **kwargs)

        zero.scaled_global_norm = scaled_global_norm
        zero.step = step

    def _guard_stage_3(self, zero: Any) -> None:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms_of_groups = zero._get_norm_groups

        def get_norm_groups() -> list[Tensor]:
            norms: list[Tensor] = norms_of_groups()
            norm = combine_grad_norm_groups(norms)
            if self._opens(_square(norm), counts=self._layout.rank == 0):
                return norms
            return [torch.full_like(norm, math.inf)]

        zero._get_norm_groups = get_norm_groups

    @torch.no_grad()
    def _opens(self, square: Tensor, *, counts: bool) -> bool:
        """Tell all ranks the numbers and judge them.

        Args:
            square: of the gradient's norm, or of this rank's part of it.
            counts: whether the part is this rank's to add.
        """
        parts = torch.zeros(3, dtype=torch.float64, device=self._layout.device)
        parts[0] = self.loss_part()
        if counts:
            parts[1] = square
        if self.wants_stop():
            parts[2] = 1.0
        if self._layout.world_size > 1:
            dist.all_reduce(parts)
        # The only place of ours where the host waits for the device.
        loss, square_sum, wishes = parts.tolist()
        grad_norm = math.sqrt(square_sum) if math.isfinite(square_sum) else math.inf
        self.numbers = StepNumbers(loss, grad_norm, wishes > 0)
        # Asked in any case: who judges has to know of every step.
        self.accepted = self.accept(self.numbers) and are_finite(self.numbers)
        return self.accepted


def are_finite(numbers: StepNumbers) -> bool:
    """Whether the loss and the gradient norm are finite."""
    return math.isfinite(numbers.loss) and math.isfinite(numbers.grad_norm)


def _square(norm: Tensor) -> Tensor:
    """In float64, where the square of a float32 is exact; inf for DeepSpeed's -1, not finite."""
    norm = norm.double()
    return torch.where(norm >= 0, norm.square(), math.inf)
