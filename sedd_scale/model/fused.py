"""What lies between the matrix products, in as few passes over memory as it takes.

Each operation is written forward and backward, once: on a CPU the passes run as they stand, in
place where nothing is lost; on a GPU each is one kernel, which PyTorch's compiler makes of the
forward passes and `backward_kernels` has of those backward passes that sum over positions.

L positions (this rank's share), B sequences, H width, F inner width of the MLP, h heads, D head
width. Vectors of a sequence are [B, H], or [S, B, H] where each of its S segments, equally long,
has its own; the passes then see rows as [S, L / S, B, H] and vectors as [S, 1, B, H].
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_scale.config.trunk import GATED
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
    centred: bool = True,
) -> tuple[Tensor, Tensor]:
    """(hidden - mean) / sqrt(variance + epsilon) * scale + shift over H, and `hidden` again.

    Without `centred` no mean is taken off (RMSNorm, arXiv 1910.07467).

    The first is [L, B, H] of `dtype`, computed in float32; what is kept for the backward pass is
    one such tensor, or the stream itself. The second is for whatever else uses the stream: its
    gradient is added to the norm's in the norm's own backward pass.
    """
    shape = hidden_LBH.shape
    vectors = [_over_positions(vector.float()) for vector in (scale_BH, shift_BH)]
    hidden_LBH = _in_segments(hidden_LBH, scale_BH)
    normed_LBH, hidden_LBH = _ModulatedNorm.apply(hidden_LBH, *vectors, epsilon, dtype, centred)
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
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, what is kept beside the stream, or else of it, and 1 / deviation."""
    if centred:
        width = hidden_LBH.shape[-1:]
        normed_LBH, mean_LB1, rstd_LB1 = torch.native_layer_norm(
            hidden_LBH.float(), width, None, None, epsilon
        )
    else:
        normed_LBH, rstd_LB1 = _over_root_mean_square(hidden_LBH.float(), epsilon)
        mean_LB1 = torch.zeros_like(rstd_LB1)
    output_LBH = torch.addcmul(shift_BH, normed_LBH, scale_BH)
    return output_LBH.to(dtype), mean_LB1 if keeps_stream else normed_LBH.to(dtype), rstd_LB1


def _over_root_mean_square(rows: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Rows over the root of their mean square, and one over that root."""
    square = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square()
    inverse = torch.rsqrt(square / rows.shape[-1] + epsilon)
    return rows * inverse, inverse


def _of_root_mean_square(grad: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of rows from that of what `_over_root_mean_square` made of them."""
    along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / grad.shape[-1]
    return torch.addcmul(grad, normed, along, value=-1).mul_(inverse)


def _norm_backward(
    grad_LBH: Tensor,
    stream_grad_LBH: Tensor | None,
    kept_LBH: Tensor,
    mean_LB1: Tensor | None,
    rstd_LB1: Tensor,
    scale_BH: Tensor,
    hidden_dtype: torch.dtype,
    centred: bool,
    wants_shift: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the stream, the scale and, if it is wanted, the shift.

    Args:
        kept_LBH: the stream, of the given mean, or without one what the norm made of it.
    """
    grad_LBH, normed_LBH = grad_LBH.float(), kept_LBH.float()
    if mean_LB1 is not None:
        normed_LBH = (normed_LBH - mean_LB1) * rstd_LB1
    grad_scale_BH = _sum_over_positions(grad_LBH * normed_LBH, scale_BH)
    if centred:
        # The gradient of a norm whose input has mean 0 and deviation 1 is that of any other but for
        # its deviation: so the input itself need not be kept.
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
        grad_hidden_LBH = grad_normed_LBH.mul_(rstd_LB1)
    else:
        grad_hidden_LBH = _of_root_mean_square(grad_LBH * scale_BH, normed_LBH, rstd_LB1)
    grad_hidden_LBH = grad_hidden_LBH.to(hidden_dtype)
    if stream_grad_LBH is not None:
        grad_hidden_LBH = grad_hidden_LBH.add_(stream_grad_LBH)
    grad_shift_BH = _sum_over_positions(grad_LBH, scale_BH) if wants_shift else None
    return grad_hidden_LBH, grad_scale_BH, grad_shift_BH


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LBH: Tensor,
        scale_BH: Tensor,
        shift_BH: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        # On a GPU what the norm made of the stream is made again, where that is read as fast.
        keeps_stream = compiled.on_gpu(hidden_LBH) and hidden_LBH.dtype == dtype
        output_LBH, kept, rstd_LB1 = _norm_forward(
            hidden_LBH, scale_BH, shift_BH, epsilon, dtype, keeps_stream, centred
        )
        ctx.hidden_dtype, ctx.centred = hidden_LBH.dtype, centred
        of_stream = (hidden_LBH, kept) if keeps_stream else (kept, None)
        ctx.save_for_backward(*of_stream, rstd_LB1, scale_BH)
        ctx.set_materialize_grads(False)
        return output_LBH, hidden_LBH

    @staticmethod
    def backward(
        ctx: Any, grad_LBH: Tensor | None, stream_grad_LBH: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_LBH is None:
            return stream_grad_LBH, None, None, None, None, None
        kept_LBH, mean_LB1, rstd_LB1, scale_BH = ctx.saved_tensors
        grads = _kernel_of(_norm_backward, grad_LBH)(
            *(grad_LBH, stream_grad_LBH, kept_LBH, mean_LB1, rstd_LB1, scale_BH),
            ctx.hidden_dtype,
            ctx.centred,
            ctx.needs_input_grad[2],
        )
        return (*grads, None, None, None)


def gated_residual(
    hidden_LBH: Tensor,
    update_LBH: Tensor,
    gate_BH: Tensor | None,
    *,
    bias_H: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """hidden + gate * dropout(update + bias), in the type of `hidden`; None drops nothing.

    Without a gate the update is added as it is.
    """
    if gate_BH is None:
        rate, *hashes = dropout or (0.0,)
        dropped_LBH = _dropped(update_LBH, bias_H, rate, *hashes)
        return torch.add(hidden_LBH, dropped_LBH.to(hidden_LBH.dtype), alpha=1 / (1 - rate))
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


def mlp_activation(
    inner_LBF: Tensor, bias_F: Tensor | None, activation: str, *, overwrite: bool
) -> Tensor:
    """The activation of inner + bias.

    "gelu" is GELU's tanh approximation. Of "swiglu" and "geglu" [L, B, 2 F] become [L, B, F]: SiLU
    or GELU of the first half, times the second (arXiv 2002.05202).

    With `overwrite` the sum takes the place of `inner`, which must be a product whose own backward
    pass does not look at it.
    """
    if activation in GATED:
        if bias_F is not None:
            inner_LBF = inner_LBF.add_(bias_F) if overwrite else inner_LBF + bias_F
        result: Tensor = _Gated.apply(inner_LBF, activation == "swiglu")
        return result
    if bias_F is None:
        return F.gelu(inner_LBF, approximate="tanh")
    result = _BiasGelu.apply(inner_LBF, bias_F, overwrite)
    return result


@compiled_on_gpu
def _gated_forward(inner_LBF: Tensor, by_silu: bool) -> Tensor:
    gate_LBF, up_LBF = inner_LBF.chunk(2, dim=-1)
    opened_LBF = F.silu(gate_LBF) if by_silu else F.gelu(gate_LBF, approximate="tanh")
    return opened_LBF * up_LBF


@compiled_on_gpu
def _gated_backward(grad_LBF: Tensor, inner_LBF: Tensor, by_silu: bool, out_LBF: Tensor) -> None:
    """Write to `out` the gradient of `inner`."""
    gate_LBF, up_LBF = inner_LBF.chunk(2, dim=-1)
    to_gate_LBF, to_up_LBF = out_LBF.chunk(2, dim=-1)
    through_LBF = grad_LBF * up_LBF
    if by_silu:
        to_up_LBF.copy_(F.silu(gate_LBF)).mul_(grad_LBF)
        to_gate_LBF.copy_(torch.ops.aten.silu_backward(through_LBF, gate_LBF))
    else:
        to_up_LBF.copy_(F.gelu(gate_LBF, approximate="tanh")).mul_(grad_LBF)
        to_gate_LBF.copy_(torch.ops.aten.gelu_backward(through_LBF, gate_LBF, approximate="tanh"))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner_LBF: Tensor, by_silu: bool) -> Tensor:
        ctx.save_for_backward(inner_LBF)
        ctx.by_silu = by_silu
        return _gated_forward(inner_LBF, by_silu)

    @staticmethod
    def backward(ctx: Any, grad_LBF: Tensor) -> tuple[Tensor, None]:
        (inner_LBF,) = ctx.saved_tensors
        out_LBF = torch.empty_like(inner_LBF)
        _gated_backward(grad_LBF, inner_LBF, ctx.by_silu, out_LBF)
        return out_LBF, None


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


def rotated_query_key_value(
    mixed_LBGRD: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [L, B, h, D], keys and values [L, B, G, D], the first two turned by their position.

    Entry i of a head turns with entry i + D / 2; `cos` and `sin` are as `rotary_table` makes them.

    Args:
        mixed_LBGRD: of each head of keys and values the h / G queries that share it, the key and
            the value: R = h / G + 2.
        weights: of the norms of queries and keys, [2 D]: both are first divided by their root mean
            square over D. None: there is no such norm.
        epsilon: of these norms.
    """
    query, key, value = _RotatedQueryKeyValue.apply(mixed_LBGRD, cos, sin, weights, epsilon)
    return query, key, value


@compiled_on_gpu
def _turn(pair_LBhRD: Tensor, cos: Tensor, sin: Tensor, turned_LBhRD: Tensor) -> None:
    """Write to `turned` the entries of `pair` turned by the angles."""
    half = pair_LBhRD.shape[-1] // 2
    first, second = pair_LBhRD[..., :half], pair_LBhRD[..., half:]
    to_first, to_second = turned_LBhRD[..., :half], turned_LBhRD[..., half:]
    to_first.copy_(first).mul_(cos).addcmul_(second, sin, value=-1)
    to_second.copy_(second).mul_(cos).addcmul_(first, sin)


def _of_heads(weights: Tensor, rows: int) -> Tensor:
    """The weight of each of the queries and of the key, float32 [R - 1, D], from [2 D]."""
    query, key = weights.float().view(2, 1, -1)
    return torch.cat([query.expand(rows - 2, -1), key])


@compiled_on_gpu
def _head_norm(pair_LBGRD: Tensor, weight_RD: Tensor, epsilon: float) -> Tensor:
    normed, _ = _over_root_mean_square(pair_LBGRD.float(), epsilon)
    return (normed * weight_RD).to(pair_LBGRD.dtype)


@compiled_on_gpu
def _head_norm_backward(
    grad_LBGRD: Tensor, pair_LBGRD: Tensor, weight_RD: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The gradient of queries and keys, and what adds up to that of their weights."""
    normed, inverse = _over_root_mean_square(pair_LBGRD.float(), epsilon)
    grad = grad_LBGRD.float()
    return _of_root_mean_square(grad * weight_RD, normed, inverse), grad * normed


class _RotatedQueryKeyValue(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed_LBGRD: Tensor,
        cos: Tensor,
        sin: Tensor,
        weights: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pair, ctx.epsilon = mixed_LBGRD[..., :-1, :], epsilon
        # With a norm the inputs are kept, of which the values are a view and alive as they are.
        ctx.save_for_backward(cos, sin, weights, None if weights is None else mixed_LBGRD)
        if weights is not None:
            pair = _head_norm(pair, _of_heads(weights, mixed_LBGRD.shape[3]), epsilon)
        # One tensor where a key has one query, so that they turn in one pass.
        parts = [pair] if pair.shape[3] == 2 else list(pair.split([pair.shape[3] - 1, 1], 3))
        turned = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        for part, to_part in zip(parts, turned):
            _turn(part, cos, sin, to_part)
        query, key = turned if len(turned) == 2 else turned[0].split(1, 3)
        return query.flatten(2, 3), key.squeeze(3), mixed_LBGRD[..., -1, :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, weights, mixed = ctx.saved_tensors
        query, key, value = grads
        # One tensor for the three, as the product wants it: no concatenation.
        groups = key.shape[2]
        rows = query.shape[2] // groups + 2
        grad = query.new_empty((*key.shape[:3], rows, key.shape[3]))
        _turn(query.unflatten(2, (groups, -1)), cos, -sin, grad[..., : rows - 2, :])
        _turn(key.unsqueeze(3), cos, -sin, grad[..., rows - 2 : rows - 1, :])
        grad[..., -1, :] = value
        grad_weights = None
        if weights is not None:
            pair = grad[..., :-1, :]
            given = (pair, mixed[..., :-1, :], _of_heads(weights, rows), ctx.epsilon)
            grad_pair, parts = _head_norm_backward(*given)
            pair.copy_(grad_pair)
            of_rows = parts.sum((0, 1, 2))
            grad_weights = torch.cat([of_rows[:-1].sum(0), of_rows[-1]]).to(weights.dtype)
        return grad, None, None, grad_weights, None
