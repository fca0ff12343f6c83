"""What makes a host wait for its device, seen on a CPU at dispatcher and accelerator."""

import traceback
from types import TracebackType
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_scale.engine.engine import Engine

_ATEN = torch.ops.aten
# On a GPU each reads a number of the device, or copies one to it from memory that is not pinned.
_READS = {
    _ATEN._local_scalar_dense.default,
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.masked_fill.Tensor,
    _ATEN.masked_fill_.Tensor,
    _ATEN.equal.default,
    _ATEN.is_nonzero.default,
    _ATEN.lift_fresh.default,
    _ATEN.repeat_interleave.Tensor,
}
# A number set where a mask says: on a GPU a fill under the mask, with the number in its arguments.
_FILLS = ("megatron/core/tensor_parallel/layers.py",)
_BY_INDEX = {_ATEN.index.Tensor, _ATEN.index_put_.default}
# Not seen by the dispatcher where the tensor lies on the host already.
_METHODS = ("tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


class Waits:
    """Notes, within, every wait of the host by the place that makes it, and updates.

    Attributes:
        events: "update", a method that reads a tensor, or "operation at file:line".
    """

    def __init__(self, engine: Engine) -> None:
        self.events: list[str] = []
        self._modes = (_Methods(self.events), _Operations(self.events))
        engine._optimizer.register_step_post_hook(lambda *_: self.events.append("update"))

    def __enter__(self) -> "Waits":
        self._synchronize = get_accelerator().synchronize
        get_accelerator().synchronize = lambda *_: self.events.append(f"synchronize at {_place()}")
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
        get_accelerator().synchronize = self._synchronize


class _Methods(TorchFunctionMode):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in _METHODS:
            self._events.append(name)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        by_mask = function in _BY_INDEX and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (by_mask or function in _READS) and not _place().startswith(_FILLS):
            self._events.append(f"{function} at {_place()}")
        return function(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of ours, DeepSpeed's or Megatron-core's."""
    for frame in reversed(traceback.extract_stack()):
        inside = any(name in frame.filename for name in ("sedd_scale/", "deepspeed/", "megatron/"))
        if inside and "tests/" not in frame.filename:
            return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
    return "a test"
