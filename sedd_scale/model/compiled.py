"""Passes over memory that a GPU runs as one compiled kernel, whatever shapes come."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from sedd_scale.files.compiler import compiles_kernels

P = ParamSpec("P")
R = TypeVar("R")

LIMIT = 64
"""Variants of one function before further ones run uncompiled; a few are made in practice."""


def compiled_on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` as it stands on a CPU, through torch.compile where its tensors are on a GPU.

    Its first positional argument is a tensor. What it is given is brought into one form, so that
    few variants are compiled: tensors without gradients, vectors of a sequence side by side in
    memory, and numbers of positions and sequences that may be any.
    """

    @functools.wraps(function)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs
        first = args[0]
        if not (isinstance(first, Tensor) and on_gpu(first) and compiles_kernels()):
            return function(*args, **kwargs)
        result: R = _compiled(function)(*(_in_one_form(argument) for argument in args))
        return result

    return dispatch


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor's passes are those of a GPU."""
    return tensor.is_cuda


BACKEND = "inductor"


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(LIMIT, torch._dynamo.config.recompile_limit)
    # Tensor ranks reduce the same numbers each for itself: a reduction whose shape is chosen by
    # timing would give each its own last bits.
    options: dict[str, Any] | None = {"deterministic": True} if BACKEND == "inductor" else None
    compiled: Callable[..., Any] = torch.compile(function, backend=BACKEND, options=options)
    return compiled


def _in_one_form(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    argument = argument.data  # knows nothing of gradients, nor of what it is a view of
    place = (argument.storage_offset(), *argument.stride())
    if argument.dim() == 2 and place != (0, argument.shape[1], 1):
        argument = argument.clone(memory_format=torch.contiguous_format)  # [B, H]: a chunk
    for axis in range(min(2, argument.dim() - 1)):  # positions and sequences
        torch._dynamo.maybe_mark_dynamic(argument, axis)
    return argument
