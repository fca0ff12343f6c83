"""What lies between the matrix products, in as few passes over memory as it takes.

Each operation is written forward and backward, once: on a CPU the passes run as they stand, in
place where nothing is lost; on a GPU each direction is compiled into one kernel.

L positions (this rank's share), B sequences, H width, F inner width of the MLP, h heads, D head
width.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def compiled_on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` as it stands on a CPU, through torch.compile where its tensors are on a GPU.

    Its first positional argument is a tensor.
    """
    compiled = functools.cache(lambda: torch.compile(function, fullgraph=True))

    @functools.wraps(function)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        on_gpu = isinstance(args[0], Tensor) and args[0].is_cuda
        return (compiled() if on_gpu else function)(*args, **kwargs)

    return dispatch


def modulated_norm(
    hidden_LBH: Tensor,
    scale_BH: Tensor,
    shift_BH: Tensor,
    *,
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """(hidden - mean) / sqrt(variance + epsilon) * scale + shift over H, [L, B, H] of `dtype`.

    Computed in float32; what is kept for the backward pass is one tensor of the size of `hidden`.
    """
    result: Tensor = _ModulatedNorm.apply(
        hidden_LBH, scale_BH.float(), shift_BH.float(), epsilon, dtype
    )
    return result


@compiled_on_gpu
def _norm_forward(
    hidden_LBH: Tensor, scale_BH: Tensor, shift_BH: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    width = hidden_LBH.shape[-1:]
    normed_LBH, _, rstd_LB1 = torch.native_layer_norm(
        hidden_LBH.float(), width, None, None, epsilon
    )
    return torch.addcmul(shift_BH, normed_LBH, scale_BH).to(dtype), normed_LBH, rstd_LB1


@compiled_on_gpu
def _norm_backward(
    grad_LBH: Tensor,
    normed_LBH: Tensor,
    rstd_LB1: Tensor,
    scale_BH: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_LBH = grad_LBH.float()
    grad_scale_BH = (grad_LBH * normed_LBH).sum(0)
    # The gradient of a norm whose input has mean 0 and deviation 1 is that of any other but for its
    # deviation: so the input itself need not be kept.
    mean, rstd = torch.zeros_like(rstd_LB1), torch.ones_like(rstd_LB1)
    grad_normed_LBH = torch.ops.aten.native_layer_norm_backward(
        grad_LBH * scale_BH,
        normed_LBH,
        normed_LBH.shape[-1:],
        mean,
        rstd,
        None,
        None,
        [True, False, False],
    )[0]
    return (grad_normed_LBH.mul_(rstd_LB1)).to(hidden_dtype), grad_scale_BH, grad_LBH.sum(0)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LBH: Tensor,
        scale_BH: Tensor,
        shift_BH: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> Tensor:
        output_LBH, normed_LBH, rstd_LB1 = _norm_forward(
            hidden_LBH, scale_BH, shift_BH, epsilon, dtype
        )
        ctx.hidden_dtype = hidden_LBH.dtype
        ctx.save_for_backward(normed_LBH, rstd_LB1, scale_BH)
        return output_LBH

    @staticmethod
    def backward(ctx: Any, grad_LBH: Tensor) -> tuple[Tensor | None, ...]:
        normed_LBH, rstd_LB1, scale_BH = ctx.saved_tensors
        grads = _norm_backward(grad_LBH, normed_LBH, rstd_LB1, scale_BH, ctx.hidden_dtype)
        return (*grads, None, None)


def gated_residual(
    hidden_LBH: Tensor,
    update_LBH: Tensor,
    gate_BH: Tensor,
    *,
    bias_H: Tensor | None = None,
    keep_LBH: Tensor | None = None,
    keep_rate: float = 1.0,
) -> Tensor:
    """hidden + gate * dropout(update + bias), in the type of `hidden`.

    Args:
        keep_LBH: bool, the entries that dropout leaves; None: all.
        keep_rate: those left are divided by it.
    """
    gate_BH = gate_BH.to(hidden_LBH.dtype)
    if keep_LBH is not None:
        gate_BH = gate_BH / keep_rate
    result: Tensor = _GatedResidual.apply(hidden_LBH, update_LBH, gate_BH, bias_H, keep_LBH)
    return result


@compiled_on_gpu
def _gate_forward(
    hidden_LBH: Tensor,
    update_LBH: Tensor,
    gate_BH: Tensor,
    bias_H: Tensor | None,
    keep_LBH: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if bias_H is not None:
        update_LBH = update_LBH + bias_H
    if keep_LBH is not None:
        update_LBH = torch.where(keep_LBH, update_LBH, 0.0)
    output_LBH = torch.addcmul(hidden_LBH, update_LBH.to(hidden_LBH.dtype), gate_BH)
    return output_LBH, update_LBH


@compiled_on_gpu
def _gate_backward(
    grad_LBH: Tensor, update_LBH: Tensor, gate_BH: Tensor, keep_LBH: Tensor | None, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_gate_BH = (grad_LBH * update_LBH).sum(0)
    grad_update_LBH = grad_LBH * gate_BH
    if keep_LBH is not None:
        grad_update_LBH = torch.where(keep_LBH, grad_update_LBH, 0.0)
    grad_bias_H = grad_update_LBH.sum((0, 1)) if with_bias else None
    return grad_update_LBH.to(update_LBH.dtype), grad_gate_BH, grad_bias_H


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LBH: Tensor,
        update_LBH: Tensor,
        gate_BH: Tensor,
        bias_H: Tensor | None,
        keep_LBH: Tensor | None,
    ) -> Tensor:
        output_LBH, update_LBH = _gate_forward(hidden_LBH, update_LBH, gate_BH, bias_H, keep_LBH)
        ctx.bias_dtype = None if bias_H is None else bias_H.dtype
        ctx.save_for_backward(update_LBH, gate_BH, keep_LBH)
        return output_LBH

    @staticmethod
    def backward(ctx: Any, grad_LBH: Tensor) -> tuple[Tensor | None, ...]:
        with_bias = ctx.bias_dtype is not None
        update_LBH, gate_BH, keep_LBH = ctx.saved_tensors
        grad_update_LBH, grad_gate_BH, grad_bias_H = _gate_backward(
            grad_LBH, update_LBH, gate_BH, keep_LBH, with_bias
        )
        if grad_bias_H is not None:
            grad_bias_H = grad_bias_H.to(ctx.bias_dtype)
        return grad_LBH, grad_update_LBH, grad_gate_BH, grad_bias_H, None


def bias_gelu(inner_LBF: Tensor, bias_F: Tensor, *, overwrite: bool) -> Tensor:
    """GELU (tanh approximation) of inner + bias.

    With `overwrite` the sum takes the place of `inner` on a CPU; then `inner` must be a product
    whose own backward pass does not look at it.
    """
    if inner_LBF.is_cuda or not overwrite:
        return _bias_gelu(inner_LBF, bias_F)
    return F.gelu(inner_LBF.add_(bias_F), approximate="tanh")


@compiled_on_gpu
def _bias_gelu(inner_LBF: Tensor, bias_F: Tensor) -> Tensor:
    return F.gelu(inner_LBF + bias_F, approximate="tanh")


@functools.lru_cache(maxsize=8)
def rotary_table(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, [L, 1, 1, 1, D / 2] each (Su et al., 2104.09864).

    Entry i turns by position / base^(2i / D); base 0 turns nothing.
    """
    # The table outlives the call: made in inference mode it could not serve training after.
    with torch.inference_mode(False):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        position = torch.arange(length, dtype=torch.float32, device=device)
        turn = base**exponent if base else torch.full_like(exponent, torch.inf)
        angle = position[:, None] / turn
        angle = angle[:, None, None, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated_query_key_value(
    mixed_LBh3D: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [L, B, h, D] of each head, the first two turned by their position.

    Entry i of a head turns with entry i + D / 2; `cos` and `sin` are as `rotary_table` makes them.
    """
    query, key, value = _RotatedQueryKeyValue.apply(mixed_LBh3D, cos, sin)
    return query, key, value


@compiled_on_gpu
def _turn(pair_LBh2D: Tensor, cos: Tensor, sin: Tensor, turned_LBh2D: Tensor) -> None:
    """Write to `turned` the entries of `pair` turned by the angles."""
    half = pair_LBh2D.shape[-1] // 2
    first, second = pair_LBh2D[..., :half], pair_LBh2D[..., half:]
    to_first, to_second = turned_LBh2D[..., :half], turned_LBh2D[..., half:]
    to_first.copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
    to_second.copy_(second).mul_(cos).addcmul_(first, sin)


class _RotatedQueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed_LBh3D: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        pair_LBh2D = mixed_LBh3D[..., :2, :]
        turned_LBh2D = torch.empty_like(pair_LBh2D, memory_format=torch.contiguous_format)
        _turn(pair_LBh2D, cos, sin, turned_LBh2D)
        query, key = turned_LBh2D.unbind(3)
        return query, key, mixed_LBh3D[..., 2, :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # One tensor for the three, as the product wants it: no concatenation.
        grad_LBh3D = grads[0].new_empty((*grads[0].shape[:3], 3, grads[0].shape[3]))
        for place, grad_LBhD in enumerate(grads[:2]):
            grad_LBh1D = grad_LBh3D[..., place : place + 1, :]
            _turn(grad_LBhD.unsqueeze(3), cos, -sin, grad_LBh1D)
        grad_LBh3D[..., 2, :] = grads[2]
        return grad_LBh3D, None, None
