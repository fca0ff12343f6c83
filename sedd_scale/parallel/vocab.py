"""Score entropy straight from hidden states, over vocabulary shards, scores never materialised.

The head's product is made for the rows that count (absorb: masked positions only), a chunk of rows
at a time. Each tensor-parallel rank holds some columns; only per-row statistics cross ranks. The
gradient of the chunk's logits overwrites them, and the gradients of hidden states, weight and bias
are made in the same pass.

M rows that count, m rows of a chunk, H hidden width, W columns (vocabulary rows) of this rank that
are real tokens, B sequences, L positions. Losses are in nats.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.diffusion.graphs import Absorb, Graph
from sedd_scale.diffusion.score_entropy import RowNoise, Statistics, row_loss

CHUNK_BYTES = 32 * 2**20


class ScoreTargets(NamedTuple):
    """What the loss needs of a noisy batch, for the rows that count.

    Attributes:
        rows_M: index of each row in the flattened [L * B] hidden states.
        sequence_M: which sequence of the batch the row belongs to.
        clean_M: the clean token x0.
        noisy_M: the noisy token x.
        noise_B3: sigma, its rate g, and g / (e^sigma - 1), float64, per sequence.
    """

    rows_M: Tensor
    sequence_M: Tensor
    clean_M: Tensor
    noisy_M: Tensor
    noise_B3: Tensor

    def to(self, device: torch.device) -> "ScoreTargets":
        """The same targets on `device`."""
        return ScoreTargets(*(tensor.to(device, non_blocking=True) for tensor in self))


def score_targets(
    graph: Graph, *, clean_BL: Tensor, noisy_BL: Tensor, noise_B3: Tensor
) -> ScoreTargets:
    """Pick the rows that count: masked positions under absorb, every position under uniform.

    Made on the host, before the tensors travel, so that no device waits for a count.
    """
    clean, noisy = clean_BL.t().reshape(-1), noisy_BL.t().reshape(-1)
    if graph.mask_id is not None:
        rows_M = (noisy == graph.mask_id).nonzero().squeeze(1)
    else:
        rows_M = torch.arange(len(noisy), device=noisy.device)
    return ScoreTargets(
        rows_M=rows_M,
        sequence_M=rows_M % len(clean_BL),
        clean_M=clean[rows_M],
        noisy_M=noisy[rows_M],
        noise_B3=noise_B3,
    )


@dataclass(frozen=True)
class VocabShard:
    """The columns of the head that this rank holds.

    Attributes:
        graph: the forward process.
        scaled: whether logits are log-scores up to the known shift of sigma (absorb only).
        start: token id of the first column.
        length: columns that are real tokens; mask and padding come after and take no part.
        group: the tensor-parallel processes, or None for one process.
        chunk_bytes: memory for one chunk of logits, in bytes.
    """

    graph: Graph
    scaled: bool
    start: int
    length: int
    group: dist.ProcessGroup | None
    chunk_bytes: int = CHUNK_BYTES

    def chunk_rows(self, num_columns: int) -> int:
        """Rows whose float32 logits over `num_columns` fit in `chunk_bytes`.

        Given the padded number of columns, which all tensor ranks share: they must cut the rows
        alike to meet in each reduction, though `length` differs from rank to rank.
        """
        return max(16, self.chunk_bytes // (4 * num_columns))

    def reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce over the tensor-parallel ranks, in place."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


class _ColumnsOf(NamedTuple):
    """Where each row's token lies in the shard: a safe column, and whether it is really there."""

    column_m1: Tensor
    present_m1: Tensor

    @staticmethod
    def find(token_m: Tensor, shard: VocabShard) -> "_ColumnsOf":
        local = token_m - shard.start
        present = (local >= 0) & (local < shard.length)
        return _ColumnsOf(torch.where(present, local, 0)[:, None], present[:, None])

    def read(self, table_mW: Tensor) -> Tensor:
        """Each row's entry at its column, zero where another rank holds it."""
        return torch.where(self.present_m1, table_mW.gather(1, self.column_m1), 0.0).squeeze(1)

    def write(self, table_mW: Tensor, value: float) -> None:
        """Set each row's entry at its column, where this rank holds it."""
        kept = table_mW.gather(1, self.column_m1)
        table_mW.scatter_(1, self.column_m1, torch.where(self.present_m1, value, kept))

    def add(self, table_mW: Tensor, value_m: Tensor) -> None:
        """Add each row's value at its column, where this rank holds it."""
        added = torch.where(self.present_m1, value_m[:, None], 0.0)
        table_mW.scatter_add_(1, self.column_m1, added)


def _chunk_loss(
    logits_mW: Tensor,
    clean_m: Tensor,
    noisy_m: Tensor,
    noise_m3: Tensor,
    shard: VocabShard,
    weight_m: Tensor | None,
) -> Tensor:
    """Per-row losses of one chunk; with `weight_m` the logits become their own gradient.

    The gradient is that of sum(weight * loss), left in `logits_mW`.
    """
    target = _ColumnsOf.find(clean_m, shard)
    own = None if isinstance(shard.graph, Absorb) else _ColumnsOf.find(noisy_m, shard)
    unchanged_m = clean_m == noisy_m
    total_m = None
    target_m = logits_mW.new_zeros(len(logits_mW))
    max_m = logits_mW.new_full((len(logits_mW),), -torch.inf)
    if shard.length:
        target_m = target.read(logits_mW)
    if own is not None:
        if shard.length:
            own.write(logits_mW, 0.0)
        total_m = logits_mW.sum(dim=1)
        if shard.length:
            own.write(logits_mW, -torch.inf)
    if shard.length:
        max_m = logits_mW.amax(dim=1)
    # A shard may hold no counted column of a row; its maximum must stay a number.
    max_m = max_m.clamp_min(torch.finfo(max_m.dtype).min)
    global_max_m = shard.reduce(max_m.clone(), dist.ReduceOp.MAX)
    exp_mW = logits_mW.sub_(max_m[:, None]).exp_()
    rescale_m = (max_m - global_max_m).exp()
    parts = [exp_mW.sum(dim=1) * rescale_m, target_m]
    if total_m is not None:
        parts.append(total_m)
    sums = shard.reduce(torch.stack(parts))
    row = row_loss(
        Statistics(
            max=global_max_m,
            sum_exp=sums[0],
            target=sums[1],
            total=None if total_m is None else sums[2],
        ),
        RowNoise(*noise_m3.unbind(1)),
        graph=shard.graph,
        scaled=shard.scaled,
        unchanged_M=None if own is None else unchanged_m,
    )
    if weight_m is not None and shard.length:
        exp_mW.mul_((row.grad_exp * rescale_m * weight_m)[:, None])
        if own is not None:
            exp_mW.add_((row.grad_rest * weight_m)[:, None])
            own.write(exp_mW, 0.0)
            target.add(exp_mW, torch.where(unchanged_m, 0.0, row.grad_target * weight_m))
        else:
            target.add(exp_mW, row.grad_target * weight_m)
    return row.loss


class _Gradients(NamedTuple):
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

    `hidden` is [R, H] with R = L * B; its gradient is this rank's part of the sum over tensor
    ranks. Weight gradients add up over chunks in float32.
    """
    columns, column_bias = weight[: shard.length], bias[: shard.length]
    num_rows = len(targets.rows_M)
    losses_M = torch.empty(num_rows, dtype=_statistics_dtype(weight), device=weight.device)
    gradients = None
    if row_weight_M is not None:
        gradients = _Gradients(
            torch.zeros_like(hidden),
            torch.zeros(weight.shape, dtype=losses_M.dtype, device=weight.device),
            torch.zeros(bias.shape, dtype=losses_M.dtype, device=weight.device),
        )
    chunk_rows = shard.chunk_rows(len(weight))
    for start in range(0, num_rows, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, num_rows))
        rows_m = targets.rows_M[chunk]
        hidden_mH = hidden.index_select(0, rows_m)
        logits_mW = torch.addmm(column_bias, hidden_mH, columns.t()).to(losses_M.dtype)
        losses_M[chunk] = _chunk_loss(
            logits_mW,
            targets.clean_M[chunk],
            targets.noisy_M[chunk],
            targets.noise_B3[targets.sequence_M[chunk]],
            shard,
            None if row_weight_M is None else row_weight_M[chunk],
        )
        if gradients is not None and shard.length:
            grad_mW = logits_mW.to(weight.dtype)
            gradients.hidden.index_copy_(0, rows_m, grad_mW @ columns)
            weight_grad = gradients.weight[: shard.length]
            if weight.dtype == weight_grad.dtype:
                weight_grad.addmm_(grad_mW.t(), hidden_mH)
            else:
                weight_grad += grad_mW.t() @ hidden_mH
            gradients.bias[: shard.length] += logits_mW.sum(dim=0)
            del grad_mW
        del logits_mW  # before the next chunk's are made: one chunk alive, not two
    return losses_M, gradients


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
        losses_M, gradients = _losses(hidden, weight, bias, targets, shard, row_weight_M)
        assert gradients is not None
        ctx.save_for_backward(
            gradients.hidden, gradients.weight.to(weight.dtype), gradients.bias.to(bias.dtype)
        )
        return (losses_M * row_weight_M).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # A copy of the weight's gradient is as large as the weight, so it is scaled in place unless
        # another backward pass may come for it.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        scale = torch.mul if kept else torch.Tensor.mul_
        hidden, weight, bias = (
            scale(saved, grad_output.to(saved.dtype)) for saved in ctx.saved_tensors
        )
        return hidden, weight, bias, None, None, None


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
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        _, gradients = _losses(hidden, weight, bias, ctx.targets, ctx.shard, grad_M)
        assert gradients is not None
        return (
            gradients.hidden,
            gradients.weight.to(weight.dtype),
            gradients.bias.to(bias.dtype),
            None,
            None,
        )


def linear_score_entropy(
    hidden_LBH: Tensor, weight: Tensor, bias: Tensor, targets: ScoreTargets, shard: VocabShard
) -> Tensor:
    """Mean score entropy of a batch, in nats per token: the training loss.

    Args:
        hidden_LBH: the head's input, every position on every tensor rank; its gradient is this
            rank's part, to be summed over tensor ranks by the mapping that produced it.
        weight, bias: this rank's vocabulary rows [W + padding, H] and [W + padding].

    Returns:
        A scalar, the sum over rows divided by L * B; equal on all tensor ranks.
    """
    flat = hidden_LBH.reshape(-1, hidden_LBH.shape[-1])
    row_weight_M = torch.full(
        (len(targets.rows_M),),
        1.0 / len(flat),
        dtype=_statistics_dtype(weight),
        device=flat.device,
    )
    if not torch.is_grad_enabled():
        return (_losses(flat, weight, bias, targets, shard, None)[0] * row_weight_M).sum()
    return _WeightedSum.apply(flat, weight, bias, targets, shard, row_weight_M)


def linear_score_entropy_per_sequence(
    hidden_LBH: Tensor, weight: Tensor, bias: Tensor, targets: ScoreTargets, shard: VocabShard
) -> Tensor:
    """Score entropy of each sequence, [B] nats summed over its positions; differentiable."""
    flat = hidden_LBH.reshape(-1, hidden_LBH.shape[-1])
    losses_M = _PerRow.apply(flat, weight, bias, targets, shard)
    zeros_B = losses_M.new_zeros(hidden_LBH.shape[1])
    return zeros_B.index_add(0, targets.sequence_M, losses_M)


def gathered_logits(
    rows_MH: Tensor, weight: Tensor, bias: Tensor, *, num_columns: int, tensor_group: Any
) -> Tensor:
    """The head's outputs [M, num_columns] for the given rows, gathered over tensor ranks.

    For inference: no gradient crosses ranks.
    """
    logits = torch.addmm(bias, rows_MH, weight.t())
    if tensor_group is not None and tensor_group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(tensor_group.size())]
        dist.all_gather(parts, logits.contiguous(), group=tensor_group)
        logits = torch.cat(parts, dim=-1)
    return logits[:, :num_columns]
