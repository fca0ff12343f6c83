"""The moment before the weights change: every rank has the step's numbers, and a verdict on them.

DeepSpeed takes the norm of the whole gradient at the start of its optimizer step. This gate stands
at that place. One all-reduce of three numbers gives every rank the loss, the gradient norm and
whether any rank wants to stop, in place of the loss's own all-reduce. Whether to update and how
much to clip are passed to the optimizer as device tensors, so that the host does not wait. It reads
the numbers once the whole step is queued, and waits for them only: the device still updates the
weights and gathers them while the host begins the next step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.engine.zero import Zero

# DeepSpeed's and Megatron-core's, against a norm of zero.
_CLIP_EPS = 1e-6


class StepNumbers(NamedTuple):
    """What all ranks know of a step."""

    loss: float
    """Mean score entropy over the global batch, nats per token."""
    grad_norm: float
    """Euclidean norm of the whole gradient before clipping; inf where that is not finite."""
    wants_stop: bool
    """Whether any rank wanted to stop."""

    @property
    def finite(self) -> bool:
        """Whether the loss and the gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepResult(NamedTuple):
    """What one optimizer step reports, equal on all ranks."""

    numbers: StepNumbers
    applied: bool
    """Whether the weights were updated."""


class UpdateGate:
    """Decides, between the gradient and the update, whether the update is made.

    Of a step whose loss or gradient norm is not finite it is not, nor of one that `accept` refuses.
    The optimizer then changes nothing but its count of steps (`AdamWithEMA.found_inf`).

    Args:
        zero: of an engine that does not clip the gradient itself.
        clip: largest norm of the gradient that the update uses.
        loss_part: this rank's part of the mean loss of the global batch, a scalar: all ranks' parts
            add up to it.

    Attributes:
        loss_part: as given.
        accept: judges a step's numbers on the host, which has to wait for them; has to answer alike
            on all ranks. None: what is finite is good.
        wants_stop: whether this rank wants to stop.
    """

    def __init__(self, zero: Zero, *, clip: float, loss_part: Callable[[], Tensor]) -> None:
        self.accept: Callable[[StepNumbers], bool] | None = None
        self.wants_stop: Callable[[], bool] = lambda: False
        self.loss_part = loss_part
        self._layout, self._clip = zero.layout, clip
        numbers = torch.full((3,), math.nan, dtype=torch.float64)
        self._numbers = _HostCopy(numbers, zero.layout.device)
        self._refused = False
        self._optimizer = zero.adam
        zero.before_update(self._judge)

    def outcome(self) -> StepResult:
        """Of the step made last.

        The host waits here until they are known, and nowhere within a step without `accept`.
        """
        numbers = self._read()
        return StepResult(numbers, numbers.finite and not self._refused)

    @torch.no_grad()
    def _judge(self, square: Tensor) -> None:
        """Tell all ranks the step's numbers, and the optimizer what to do.

        Args:
            square: this rank's part of that of the gradient's norm.
        """
        parts = torch.zeros(3, dtype=torch.float64, device=self._layout.device)
        parts[0] = self.loss_part()
        parts[1] = square
        if self.wants_stop():
            parts[2] = 1.0
        if self._layout.world_size > 1:
            dist.all_reduce(parts)
        self._numbers.take(parts)
        # Asked in any case: who judges has to know of every step.
        self._refused = self.accept is not None and not self.accept(self._read())
        found_inf = torch.ones((), device=parts.device)
        if not self._refused:
            found_inf = (~parts[:2].isfinite().all()).float()
        self._optimizer.found_inf = found_inf
        norm = parts[1].sqrt()
        self._optimizer.grad_scale = ((norm + _CLIP_EPS) / self._clip).clamp(min=1.0).float()

    def _read(self) -> StepNumbers:
        loss, square, wishes = self._numbers.read().tolist()
        grad_norm = math.sqrt(square) if math.isfinite(square) else math.inf
        return StepNumbers(loss, grad_norm, wishes > 0)


class _HostCopy:
    """A few numbers of the device on the host, once they are known and whatever comes after.

    Args:
        initial: on the CPU.
    """

    def __init__(self, initial: Tensor, device: torch.device) -> None:
        self._known: torch.cuda.Event | None = None
        self._copy = initial
        if device.type == "cuda":
            self._copy, self._known = initial.pin_memory(), torch.cuda.Event()

    def take(self, numbers: Tensor) -> None:
        """Copy them behind what is queued."""
        self._copy.copy_(numbers, non_blocking=True)
        if self._known is not None:
            self._known.record()

    def read(self) -> Tensor:
        """The copy made last, when it has arrived."""
        if self._known is not None:
            self._known.synchronize()
        return self._copy
