"""What lies between the matrix products, in as few passes over memory as it takes.

Each operation is written forward and backward, once: on a CPU the passes run as they stand, in
place where nothing is lost; on a GPU each is one kernel, which PyTorch's compiler makes of the
forward passes and `backward_kernels` has of those backward passes that sum over positions.

L positions (this rank's share), B sequences, H width, F inner width of the MLP, h heads, D head
width. Vectors of a sequence are [B, H], or [S, B, H] where each of its S segments, equally long,
has its own; the passes then see rows as [S, L / S, B, H] and vectors as [S, 1, B, H].
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_scale.files.compiler import compiles_kernels
from sedd_scale.model import compiled
from sedd_scale.model.compiled import compiled_on_gpu
from sedd_scale.model.dropout import Dropout, keep_mask

P = ParamSpec("P")
R = TypeVar("R")


def modulated_norm(
    hidden_LBH: Tensor,
    scale_BH: Tensor,
    shift_BH: Tensor,
    *,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(hidden - mean) / sqrt(variance + epsilon) * scale + shift over H, and `hidden` again.

    The first is [L, B, H] of `dtype`, computed in float32; what is kept for the backward pass is
    one such tensor, or the stream itself. The second is for whatever else uses the stream: its
    gradient is added to the norm's in the norm's own backward pass.
    """
    shape = hidden_LBH.shape
    vectors = [_over_positions(vector.float()) for vector in (scale_BH, shift_BH)]
    hidden_LBH = _in_segments(hidden_LBH, scale_BH)
    normed_LBH, hidden_LBH = _ModulatedNorm.apply(hidden_LBH, *vectors, epsilon, dtype)
    return normed_LBH.view(shape), hidden_LBH.view(shape)


def _kernel_of(function: Callable[P, R], tensor: Tensor) -> Callable[P, R]:
    """The kernel that does the same, where the tensor is on a GPU with kernels."""
    if not (tensor.is_cuda and compiles_kernels()):
        return function
    from sedd_scale.model import backward_kernels

    kernel: Callable[P, R] = getattr(backward_kernels, function.__name__.removeprefix("_"))
    return kernel


def _in_segments(rows_LBH: Tensor, vector_BH: Tensor) -> Tensor:
    """The rows as [S, L / S, B, H] where the vectors are [S, B, H]."""
    return rows_LBH if vector_BH.dim() == 2 else rows_LBH.unflatten(0, (len(vector_BH), -1))


def _over_positions(vector_BH: Tensor) -> Tensor:
    return vector_BH if vector_BH.dim() == 2 else vector_BH.unsqueeze(1)


def _sum_over_positions(rows_LBH: Tensor, vector_BH: Tensor) -> Tensor:
    return rows_LBH.sum(-3).view(vector_BH.shape)


@compiled_on_gpu
def _norm_forward(
    hidden_LBH: Tensor,
    scale_BH: Tensor,
    shift_BH: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    keeps_stream: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, what is kept beside the stream, or else of it, and 1 / deviation."""
    width = hidden_LBH.shape[-1:]
    normed_LBH, mean_LB1, rstd_LB1 = torch.native_layer_norm(
        hidden_LBH.float(), width, None, None, epsilon
    )
    output_LBH = torch.addcmul(shift_BH, normed_LBH, scale_BH)
    return output_LBH.to(dtype), mean_LB1 if keeps_stream else normed_LBH.to(dtype), rstd_LB1


def _norm_backward(
    grad_LBH: Tensor,
    stream_grad_LBH: Tensor | None,
    kept_LBH: Tensor,
    mean_LB1: Tensor | None,
    rstd_LB1: Tensor,
    scale_BH: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, the scale and the shift.

    Args:
        kept_LBH: the stream, of the given mean, or without one what the norm made of it.
    """
    grad_LBH, normed_LBH = grad_LBH.float(), kept_LBH.float()
    if mean_LB1 is not None:
        normed_LBH = (normed_LBH - mean_LB1) * rstd_LB1
    grad_scale_BH = _sum_over_positions(grad_LBH * normed_LBH, scale_BH)
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
    grad_hidden_LBH = grad_normed_LBH.mul_(rstd_LB1).to(hidden_dtype)
    if stream_grad_LBH is not None:
        grad_hidden_LBH = grad_hidden_LBH.add_(stream_grad_LBH)
    return grad_hidden_LBH, grad_scale_BH, _sum_over_positions(grad_LBH, scale_BH)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LBH: Tensor,
        scale_BH: Tensor,
        shift_BH: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        # On a GPU what the norm made of the stream is made again, where that is read as fast.
        keeps_stream = compiled.on_gpu(hidden_LBH) and hidden_LBH.dtype == dtype
        output_LBH, kept, rstd_LB1 = _norm_forward(
            hidden_LBH, scale_BH, shift_BH, epsilon, dtype, keeps_stream
        )
        ctx.hidden_dtype = hidden_LBH.dtype
        of_stream = (hidden_LBH, kept) if keeps_stream else (kept, None)
        ctx.save_for_backward(*of_stream, rstd_LB1, scale_BH)
        ctx.set_materialize_grads(False)
        return output_LBH, hidden_LBH

    @staticmethod
    def backward(
        ctx: Any, grad_LBH: Tensor | None, stream_grad_LBH: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_LBH is None:
            return stream_grad_LBH, None, None, None, None
        kept_LBH, mean_LB1, rstd_LB1, scale_BH = ctx.saved_tensors
        grads = _kernel_of(_norm_backward, grad_LBH)(
            *(grad_LBH, stream_grad_LBH, kept_LBH, mean_LB1, rstd_LB1, scale_BH),
            ctx.hidden_dtype,
        )
        return (*grads, None, None)


def gated_residual(
    hidden_LBH: Tensor,
    update_LBH: Tensor,
    gate_BH: Tensor,
    *,
    bias_H: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """hidden + gate * dropout(update + bias), in the type of `hidden`; None drops nothing."""
    gate_BH, shape = gate_BH.to(hidden_LBH.dtype), hidden_LBH.shape
    rate, hashes = 0.0, list[Tensor]()
    if dropout is not None:
        gate_BH = gate_BH / (1 - dropout.rate)
        rate, *of_rows, of_channels = dropout
        hashes = [*(_in_segments(hash_LB1, gate_BH) for hash_LB1 in of_rows), of_channels]
    rows = (_in_segments(hidden_LBH, gate_BH), _in_segments(update_LBH, gate_BH))
    result: Tensor = _GatedResidual.apply(*rows, _over_positions(gate_BH), bias_H, rate, *hashes)
    return result.view(shape)


@compiled_on_gpu
def _gate_forward(
    hidden_LBH: Tensor,
    update_LBH: Tensor,
    gate_BH: Tensor,
    bias_H: Tensor | None,
    keeps_dropped: bool,
    rate: float,
    *hashes: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The output and, if it is to be kept, what dropout leaves of the update with its bias."""
    dropped_LBH = _dropped(update_LBH, bias_H, rate, *hashes)
    output_LBH = torch.addcmul(hidden_LBH, dropped_LBH.to(hidden_LBH.dtype), gate_BH)
    return output_LBH, dropped_LBH if keeps_dropped else None


def _dropped(update_LBH: Tensor, bias_H: Tensor | None, rate: float, *hashes: Tensor) -> Tensor:
    if bias_H is not None:
        update_LBH = update_LBH + bias_H
    return torch.where(keep_mask(rate, *hashes), update_LBH, 0.0) if rate else update_LBH


def _gate_backward(
    grad_LBH: Tensor,
    dropped_LBH: Tensor,
    gate_BH: Tensor,
    bias_H: Tensor | None,
    kept_dropped: bool,
    rate: float,
    *hashes: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the update, the gate and the bias."""
    dtype = dropped_LBH.dtype
    if not kept_dropped:
        dropped_LBH = _dropped(dropped_LBH, bias_H, rate, *hashes)
    grad_gate_BH = _sum_over_positions(grad_LBH * dropped_LBH, gate_BH)
    grad_update_LBH = grad_LBH * gate_BH
    if rate:
        grad_update_LBH = torch.where(keep_mask(rate, *hashes), grad_update_LBH, 0.0)
    grad_bias_H = None
    if bias_H is not None:
        grad_bias_H = grad_update_LBH.flatten(0, -2).sum(0).to(bias_H.dtype)
    return grad_update_LBH.to(dtype), grad_gate_BH, grad_bias_H


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LBH: Tensor,
        update_LBH: Tensor,
        gate_BH: Tensor,
        bias_H: Tensor | None,
        rate: float,
        *hashes: Tensor,
    ) -> Tensor:
        # On a GPU what dropout leaves is made again, which costs less than to write it.
        ctx.kept_dropped, ctx.rate = not compiled.on_gpu(update_LBH), rate
        output_LBH, dropped_LBH = _gate_forward(
            hidden_LBH, update_LBH, gate_BH, bias_H, ctx.kept_dropped, rate, *hashes
        )
        kept_LBH = update_LBH if dropped_LBH is None else dropped_LBH
        ctx.save_for_backward(kept_LBH, gate_BH, bias_H, *hashes)
        return output_LBH

    @staticmethod
    def backward(ctx: Any, grad_LBH: Tensor) -> tuple[Tensor | None, ...]:
        kept_LBH, gate_BH, bias_H, *hashes = ctx.saved_tensors
        grads = _kernel_of(_gate_backward, grad_LBH)(
            grad_LBH, kept_LBH, gate_BH, bias_H, ctx.kept_dropped, ctx.rate, *hashes
        )
        return grad_LBH, *grads, *([None] * (1 + len(hashes)))


def bias_gelu(inner_LBF: Tensor, bias_F: Tensor, *, overwrite: bool) -> Tensor:
    """GELU (tanh approximation) of inner + bias.

    With `overwrite` the sum takes the place of `inner`, which must be a product whose own backward
    pass does not look at it.
    """
    result: Tensor = _BiasGelu.apply(inner_LBF, bias_F, overwrite)
    return result


@compiled_on_gpu
def _gelu_forward(inner_LBF: Tensor, bias_F: Tensor) -> Tensor:
    return F.gelu(inner_LBF + bias_F, approximate="tanh")


def _gelu_backward(grad_LBF: Tensor, inner_LBF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    grad_LBF = torch.ops.aten.gelu_backward(grad_LBF, inner_LBF + bias_F, approximate="tanh")
    return grad_LBF, grad_LBF.flatten(0, -2).sum(0).to(bias_F.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner_LBF: Tensor, bias_F: Tensor, overwrite: bool) -> Tensor:
        # On a GPU the sum is made again, which costs less than to write it.
        ctx.summed = overwrite and not compiled.on_gpu(inner_LBF)
        if ctx.summed:
            inner_LBF.add_(bias_F)
            ctx.save_for_backward(inner_LBF)
            return F.gelu(inner_LBF, approximate="tanh")
        ctx.save_for_backward(inner_LBF, bias_F)
        return _gelu_forward(inner_LBF, bias_F)

    @staticmethod
    def backward(ctx: Any, grad_LBF: Tensor) -> tuple[Tensor, Tensor, None]:
        if ctx.summed:
            (sum_LBF,) = ctx.saved_tensors
            grad_LBF = torch.ops.aten.gelu_backward(grad_LBF, sum_LBF, approximate="tanh")
            return grad_LBF, grad_LBF.sum((0, 1)), None
        return *_kernel_of(_gelu_backward, grad_LBF)(grad_LBF, *ctx.saved_tensors), None


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
