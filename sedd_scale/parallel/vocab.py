"""Losses straight from hidden states, over vocabulary shards, scores never materialised.

Score entropy, or weighted cross-entropy, which needs no more than the same statistics.

The head's product is made for the rows that count (absorb: masked positions only), a chunk of rows
at a time. Each tensor-parallel rank holds some columns; only per-row statistics cross ranks. The
gradient of the chunk's logits overwrites them, and the gradients of hidden states, weight and bias
are made in the same pass.

M rows that count, m rows of a chunk, H hidden width, W columns (vocabulary rows) of this rank that
are real tokens, B sequences, L positions. Losses are in nats.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sedd_scale.arrays import IntArray
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.diffusion.score_entropy import RowNoise, Statistics
from sedd_scale.parallel.mean_chunk import mean_chunk_loss
from sedd_scale.parallel.score_kernel import (
    Coefficients,
    RowColumns,
    chunk_gradient,
    chunk_statistics,
    has_kernel,
)
from sedd_scale.parallel.vocab_shard import VocabShard


class ScoreTargets(NamedTuple):
    """What the loss needs of a noisy batch, for the rows that count.

    Attributes:
        rows_M: index of each row in the flattened [L * B] hidden states; where outputs are for the
            next position a row may be there twice.
        sequence_M: which sequence of the batch the row belongs to.
        clean_M: the clean token x0.
        noisy_M: the noisy token x.
        noise_B3: sigma, its rate g, and g / (e^sigma - 1), float64, per sequence. The last is the
            weight of a row's cross-entropy where that is the loss.
        row_weight: what a row's loss counts in the mean, a float64 scalar: 1 / positions.
    """

    rows_M: Tensor
    sequence_M: Tensor
    clean_M: Tensor
    noisy_M: Tensor
    noise_B3: Tensor
    row_weight: Tensor

    def to(self, device: torch.device) -> "ScoreTargets":
        """The same targets on `device`."""
        return ScoreTargets(*(tensor.to(device, non_blocking=True) for tensor in self))


def score_targets(
    graph: Graph,
    *,
    clean_BL: Tensor,
    noisy_BL: Tensor,
    noise_B3: Tensor,
    every_position: bool = False,
    counted_BL: Tensor | None = None,
    mean_over: float | None = None,
    starts_BL: Tensor | None = None,
) -> ScoreTargets:
    """Pick the rows that count: masked positions under absorb, every position under uniform.

    Made on the host, before the tensors travel, so that no device waits for a count.

    Where outputs are for the next position, the row of a position is the one before it in its
    document, and a document's first position has its own. A causal network would see the answer
    there: it has no loss for such positions, and they are not counted.

    Args:
        every_position: every position counts under absorb too (a causal network).
        counted_BL: the positions that are no padding, which has no part in the loss; None: all.
        mean_over: the number of positions that the mean loss is taken over; None: all L * B that
            can have one.
        starts_BL: the first position of each document, where outputs are for the next position.
    """
    clean, noisy = clean_BL.numpy(), noisy_BL.numpy()
    if graph.mask_id is None or every_position:
        rows_BL = np.ones_like(noisy, np.bool_)
    else:
        rows_BL = noisy == graph.mask_id
    positions = clean.size
    if starts_BL is not None and every_position:
        rows_BL &= ~starts_BL.numpy()
        positions = int(rows_BL.sum())
    if counted_BL is not None:
        rows_BL &= counted_BL.numpy()
    # numpy finds and gathers them faster than torch does on one thread, and than it divides.
    rows_M = np.flatnonzero(np.ascontiguousarray(rows_BL.T))
    sequence_R, place_R = _sequences_and_places(*clean.shape)
    place_M = place_R.take(rows_M)
    source_M = rows_M
    if starts_BL is not None:
        source_M = rows_M - len(clean) * ~starts_BL.numpy().reshape(-1).take(place_M)
    return ScoreTargets(
        rows_M=torch.from_numpy(source_M),
        sequence_M=torch.from_numpy(sequence_R.take(rows_M)),
        clean_M=torch.from_numpy(clean.reshape(-1).take(place_M)),
        noisy_M=torch.from_numpy(noisy.reshape(-1).take(place_M)),
        noise_B3=noise_B3,
        row_weight=torch.tensor(1.0 / (mean_over or positions or 1), dtype=torch.float64),
    )


@functools.lru_cache(maxsize=4)
def _sequences_and_places(batch: int, length: int) -> tuple[IntArray, IntArray]:
    """For each row of the flattened [L * B] its sequence, and its place in the flat [B * L]."""
    place_R = np.arange(batch * length).reshape(batch, length).T.reshape(-1)
    return np.tile(np.arange(batch), length), place_R


def _chunk_loss(
    logits_mW: Tensor,
    clean_m: Tensor,
    noisy_m: Tensor,
    noise_m3: Tensor,
    shard: VocabShard,
    weight_m: Tensor | None,
    bias_W: Tensor | None,
    gradient_mW: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Per-row losses of one chunk, and with `weight_m` the gradient of sum(weight * loss).

    That is `gradient_mW`, written, with the sums of its columns [W]. The logits are overwritten;
    `bias_W` is still to be added to them, if given.
    """
    law = shard.law
    if law.of_clean_token:
        return mean_chunk_loss(
            logits_mW, clean_m, noisy_m, noise_m3, shard, weight_m, bias_W, gradient_mW
        )
    own_m = None if law.counts_own else shard.column_of(noisy_m)
    columns = RowColumns(target=shard.column_of(clean_m), own=own_m)
    chunk = chunk_statistics(logits_mW, columns, bias_W)
    max_m = shard.reduce(chunk.max.clone(), dist.ReduceOp.MAX)
    rescale_m = (chunk.max - max_m).exp()
    parts = [chunk.sum_exp * rescale_m, chunk.target]
    if chunk.total is not None:
        parts.append(chunk.total)
    sum_exp_m, target_m, *total_m = shard.reduce(torch.stack(parts))
    statistics = Statistics(max_m, sum_exp_m, target_m, total_m[0] if total_m else None)
    row = law.rows(statistics, RowNoise(*noise_m3.unbind(1)), clean_m == noisy_m)
    if weight_m is None:
        return row.loss, None
    coefficients = Coefficients(
        exp=row.grad_exp * rescale_m * weight_m,
        rest=row.grad_rest * weight_m,
        target=row.grad_target * weight_m,
    )
    return row.loss, chunk_gradient(chunk, columns, coefficients, gradient_mW)


class _Gradients(NamedTuple):
    """Of the rows that count [M, H], the weight and the bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def _losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: ScoreTargets,
    shard: VocabShard,
    row_weight_M: Tensor | None,
) -> tuple[Tensor, _Gradients | None]:
    """Per-row losses [M], and with row weights the gradients of their weighted sum.

    `hidden` is [R, H] with R = L * B; the gradient of its rows is this rank's part of the sum over
    tensor ranks. Weight gradients add up over chunks in float32.
    """
    columns, column_bias = weight[: shard.length], bias[: shard.length]
    num_rows = len(targets.rows_M)
    losses_M = torch.empty(num_rows, dtype=_statistics_dtype(weight), device=weight.device)
    gradients = None
    if row_weight_M is not None:
        gradients = _Gradients(
            torch.empty(num_rows, hidden.shape[1], dtype=hidden.dtype, device=hidden.device),
            torch.empty(weight.shape, dtype=losses_M.dtype, device=weight.device),
            torch.zeros(bias.shape, dtype=losses_M.dtype, device=weight.device),
        )
        # The first chunk writes what it covers; the weight is too large to be filled for nothing.
        gradients.weight[shard.length if num_rows else 0 :].zero_()
    num_chunks = -(-num_rows // shard.chunk_rows(len(weight), weight.device.type))
    chunk_rows = -(-num_rows // max(1, num_chunks))  # even chunks: a small rest is a slow product
    # One buffer for all chunks. Where logits are wider than the weights their gradient has its own.
    buffer = _aligned_rows(chunk_rows, shard.length, weight, _logits_dtype(weight))
    gradient_buffer = buffer
    if gradients is not None and buffer.dtype != weight.dtype:
        gradient_buffer = _aligned_rows(chunk_rows, shard.length, weight, weight.dtype)
    kernels = has_kernel(buffer)
    for start in range(0, num_rows, max(1, chunk_rows)):
        chunk = slice(start, min(start + chunk_rows, num_rows))
        hidden_mH = hidden.index_select(0, targets.rows_M[chunk])
        logits_mW = buffer[: len(hidden_mH)]
        # The kernels add the bias: the product would first be filled with it, then read again.
        _linear(hidden_mH, columns, None if kernels else column_bias, logits_mW)
        losses_M[chunk], made = _chunk_loss(
            logits_mW,
            targets.clean_M[chunk],
            targets.noisy_M[chunk],
            targets.noise_B3[targets.sequence_M[chunk]],
            shard,
            None if row_weight_M is None else row_weight_M[chunk],
            column_bias if kernels else None,
            gradient_buffer[: len(hidden_mH)],
        )
        if gradients is None:
            continue
        assert made is not None
        grad_mW, sums_W = made
        gradients.bias[: shard.length] += sums_W
        torch.mm(grad_mW, columns, out=gradients.hidden[chunk])
        weight_grad = gradients.weight[: shard.length]
        _add_product(weight_grad, grad_mW.t(), hidden_mH, first=start == 0)
    if gradients is not None:
        gradients = _Gradients(
            gradients.hidden, gradients.weight.to(weight.dtype), gradients.bias.to(bias.dtype)
        )
    return losses_M, gradients


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total += left @ right, or = for the first, in the type of `total`, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    elif total.is_cuda:
        # The product itself adds in float32: no pass over a rounded product.
        torch.addmm(total, left, right, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _linear(rows_mH: Tensor, weight: Tensor, bias: Tensor | None, out_mW: Tensor) -> None:
    """rows @ weight^T + bias, in the type of `out`, which on a GPU may be wider."""
    if out_mW.dtype != weight.dtype:
        torch.mm(rows_mH, weight.t(), out_dtype=out_mW.dtype, out=out_mW)
        if bias is not None:
            out_mW += bias
    elif bias is None:
        torch.mm(rows_mH, weight.t(), out=out_mW)
    else:
        torch.addmm(bias, rows_mH, weight.t(), out=out_mW)


def _logits_dtype(weight: Tensor) -> torch.dtype:
    """Of the head's products: a GPU hands out its float32 sums of bfloat16 products."""
    return torch.float32 if weight.is_cuda and weight.dtype == torch.bfloat16 else weight.dtype


def _aligned_rows(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An unset matrix whose rows start on whole cache lines, with zeros between them.

    The product that writes it is up to 1.4 times faster than with rows of an odd length. Products
    that read it may read whole tiles (bfloat16 on processors with AMX does, under oneDNN): zeros
    times zeros add nothing there, but what memory held before may be NaN.
    """
    aligned = -(-columns // 16) * 16
    whole = torch.empty(rows, aligned, dtype=dtype, device=like.device)
    whole[:, columns:].zero_()
    return whole[:, :columns]


def _of_inputs(
    gradients: _Gradients, hidden: Tensor, targets: ScoreTargets, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all hidden states (zero where a row does not count), weight and bias."""
    hidden_grad = torch.zeros_like(hidden)
    if shard.rows_twice:  # never more often, and a + b = b + a: the order changes no bit
        hidden_grad.index_add_(0, targets.rows_M, gradients.hidden)
    else:
        hidden_grad.index_copy_(0, targets.rows_M, gradients.hidden)
    return hidden_grad, gradients.weight, gradients.bias


def _statistics_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class _WeightedSum(torch.autograd.Function):
    """sum(weight * loss) with every gradient made during the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: ScoreTargets,
        shard: VocabShard,
        row_weight_M: Tensor,
    ) -> Tensor:
        losses_M, ctx.gradients = _losses(hidden, weight, bias, targets, shard, row_weight_M)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.targets, ctx.shard, ctx.row_weight_M = targets, shard, row_weight_M
        return (losses_M * row_weight_M).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        # Handed out and scaled in place, for a copy of the weight's gradient is as large as the
        # weight; a second pass through a retained graph makes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            arguments = (hidden, weight, bias, ctx.targets, ctx.shard, ctx.row_weight_M)
            gradients = _losses(*arguments)[1]
        for part in gradients:
            part.mul_(grad_output)
        return (*_of_inputs(gradients, hidden, ctx.targets, ctx.shard), None, None, None)


class _PerRow(torch.autograd.Function):
    """Per-row losses; the backward pass makes the logits again, for any gradient of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: ScoreTargets,
        shard: VocabShard,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.targets, ctx.shard = targets, shard
        return _losses(hidden, weight, bias, targets, shard, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        _, gradients = _losses(hidden, weight, bias, ctx.targets, ctx.shard, grad_M)
        assert gradients is not None
        return (*_of_inputs(gradients, hidden, ctx.targets, ctx.shard), None, None)


def linear_score_entropy(
    hidden_LBH: Tensor, weight: Tensor, bias: Tensor, targets: ScoreTargets, shard: VocabShard
) -> Tensor:
    """Mean score entropy (or what the shard says) of a batch, in nats per token: the training loss.

    Args:
        hidden_LBH: the head's input, every position on every tensor rank; its gradient is this
            rank's part, to be summed over tensor ranks by the mapping that produced it.
        weight, bias: this rank's vocabulary rows [W + padding, H] and [W + padding].

    Returns:
        A scalar, the sum over rows times the targets' `row_weight`; equal on all tensor ranks.
    """
    flat = hidden_LBH.reshape(-1, hidden_LBH.shape[-1])
    row_weight_M = targets.row_weight.to(_statistics_dtype(weight)).expand(len(targets.rows_M))
    if not torch.is_grad_enabled():
        return (_losses(flat, weight, bias, targets, shard, None)[0] * row_weight_M).sum()
    return _WeightedSum.apply(flat, weight, bias, targets, shard, row_weight_M)


def linear_score_entropy_per_sequence(
    hidden_LBH: Tensor, weight: Tensor, bias: Tensor, targets: ScoreTargets, shard: VocabShard
) -> Tensor:
    """The same loss of each sequence, [B] nats summed over its positions; differentiable."""
    flat = hidden_LBH.reshape(-1, hidden_LBH.shape[-1])
    losses_M = _PerRow.apply(flat, weight, bias, targets, shard)
    zeros_B = losses_M.new_zeros(hidden_LBH.shape[1])
    return zeros_B.index_add(0, targets.sequence_M, losses_M)


def gathered_logits(
    rows_MH: Tensor, weight: Tensor, bias: Tensor, *, num_columns: int, tensor_group: Any
) -> Tensor:
    """The head's outputs [M, num_columns] for the given rows, gathered over tensor ranks.

    For inference: no gradient crosses ranks. In float32 on a GPU whatever the weights are.
    """
    logits = _aligned_rows(len(rows_MH), len(weight), weight, _logits_dtype(weight))
    _linear(rows_MH, weight, bias, logits)
    if tensor_group is not None and tensor_group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(tensor_group.size())]
        dist.all_gather(parts, logits.contiguous(), group=tensor_group)
        logits = torch.cat(parts, dim=-1)
    return logits[:, :num_columns]


def losses_of_logits(
    rows_MW: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    targets: ScoreTargets,
    laws: Sequence[RowLaw],
) -> Tensor:
    """Losses of each sequence in nats, [B, C], from whole rows of logits; without gradients.

    Args:
        rows_MW: of the rows that count, what `logits_of` makes their logits [m, V] of.
        laws: what a row means, for each column of the result.
    """
    nats_BC = torch.zeros(len(targets.noise_B3), len(laws), device=rows_MW.device)
    shards = [VocabShard(law, 0, law.graph.num_tokens, None) for law in laws]
    step = shards[0].chunk_rows(laws[0].graph.num_states, rows_MW.device.type)
    for at in range(0, len(rows_MW), step):
        chunk = slice(at, at + step)
        logits_mN = logits_of(rows_MW[chunk])[:, : laws[0].graph.num_tokens]
        sequence_m = targets.sequence_M[chunk]
        of_rows = targets.clean_M[chunk], targets.noisy_M[chunk], targets.noise_B3[sequence_m]
        for column, shard in enumerate(shards):
            own_mN = logits_mN.clone()  # overwritten
            losses_m, _ = _chunk_loss(own_mN, *of_rows, shard, None, None, own_mN)
            nats_BC[:, column].index_add_(0, sequence_m, losses_m.to(nats_BC.dtype))
    return nats_BC
