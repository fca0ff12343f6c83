"""What a checkpoint holds of this process: its fragments as boxes, in place or in a host copy."""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.checkpoint.boxes import LogicalTensor
from sedd_scale.errors import TrainingError
from sedd_scale.parallel.agreement import gathered

if TYPE_CHECKING:  # evaluation and sampling load weights without an engine
    from sedd_scale.engine.fragments import ZeroFragments


_BYTES = 4  # of a float32


def fragment_tensors(fragments: "ZeroFragments", *, saving: bool) -> dict[str, LogicalTensor]:
    """The logical tensors NAME/KEY, whose parts are views of this process's state.

    Args:
        saving: leave out what another tensor rank writes.
    """
    tensors = {}
    for logical, key in fragments.states():
        tensor = LogicalTensor(logical.shape)
        if not saving or logical.owned(fragments.layout):
            fragment = fragments.get(logical, key)
            if fragment is not None:
                tensor.add(logical, fragment.flat, fragment.start)
        tensors[f"{logical.name}/{key}"] = tensor
    return tensors


def all_shapes(
    fragments: "ZeroFragments", group: dist.ProcessGroup | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of the logical tensors NAME/KEY of all pipeline stages; collective."""
    layout, own = fragments.layout, {}
    if layout.tensor_rank == 0 and layout.data_rank == 0:
        own = {f"{logical.name}/{key}": logical.shape for logical, key in fragments.states()}
    return {name: shape for shapes in gathered(own, group) for name, shape in shapes.items()}


def state_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes of float32 tensors of these shapes."""
    return _BYTES * sum(math.prod(shape) for shape in shapes.values())


class HostCopy:
    """A copy of what this process saves, in host memory that is made once and used again.

    With a GPU the memory is page-locked. It takes as many bytes as this process's share of a
    checkpoint: 16 a parameter, over the data-parallel ranks.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, LogicalTensor] = {}
        self._parts: dict[tuple[str, str], Tensor] = {}
        self._locked: Tensor | None = None

    @torch.no_grad()
    def take(self, fragments: "ZeroFragments") -> dict[str, LogicalTensor]:
        """Copy the state as it is now; the same tensors as `fragment_tensors`, of the copy.

        What an earlier call returned changes with it.
        """
        if not self._tensors:
            self._make(fragments)
        for logical, key in fragments.states():
            part = self._parts.get((logical.name, key))
            if part is not None:
                fragment = fragments.get(logical, key)
                assert fragment is not None, logical.name
                part.copy_(fragment.flat, non_blocking=True)
        if fragments.layout.device.type == "cuda":
            torch.cuda.synchronize(fragments.layout.device)
        return self._tensors

    def close(self) -> None:
        """Let the memory go."""
        if self._locked is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked.data_ptr())
        self._locked = None
        self._tensors, self._parts = {}, {}

    def _make(self, fragments: "ZeroFragments") -> None:
        layout = fragments.layout
        found = {
            (logical.name, key): (logical, fragment)
            for logical, key in fragments.states()
            if logical.owned(layout)
            if (fragment := fragments.get(logical, key)) is not None
        }
        memory = torch.empty(sum(fragment.flat.numel() for _, fragment in found.values()))
        if layout.device.type == "cuda" and memory.numel():
            # Not `pin_memory`, which would round the size up to a power of two.
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
            if int(status) != 0:
                raise TrainingError(
                    f"cannot lock {memory.nbytes} bytes of host memory for the copy of a "
                    "checkpoint: set checkpoint.async_save=false"
                )
            self._locked = memory
        self._tensors = {
            f"{logical.name}/{key}": LogicalTensor(logical.shape)
            for logical, key in fragments.states()
        }
        begin = 0
        for (name, key), (logical, fragment) in found.items():
            part = memory.narrow(0, begin, fragment.flat.numel())
            self._parts[name, key] = part
            self._tensors[f"{name}/{key}"].add(logical, part, fragment.start)
            begin += part.numel()
