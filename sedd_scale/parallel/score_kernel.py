"""Statistics of a chunk of logits, and the gradient that follows from them.

Two passes over the chunk, three under the mean parametrisation, with room between them for the
statistics to cross tensor ranks. Plain PyTorch defines them; on a GPU with Triton a kernel each
does the same, which reads the logits once, the last to write the gradient.

m rows of a chunk, W columns of this rank's vocabulary shard.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.files.compiler import compiles_kernels

# Columns that one program of a kernel works on at once, and the rows whose gradients it makes.
STATISTICS_BLOCK, GRADIENT_BLOCK, GRADIENT_ROWS = 4096, 2048, 32
NUM_WARPS = 8
_LOWEST = torch.finfo(torch.float32).min


class RowColumns(NamedTuple):
    """Columns that a row singles out, -1 where another rank holds them; int64 [m] each."""

    target: Tensor
    """Column of the clean token."""
    own: Tensor | None
    """Column that is not counted (uniform: the noisy token); None where all are."""


class ChunkStatistics(NamedTuple):
    """What a chunk tells of each row, in float32 (float64 for float64 logits), [m] each."""

    max: Tensor
    """Greatest counted logit, finite even where no column is counted."""
    sum_exp: Tensor
    """Sum of e^(z - max) over counted columns."""
    target: Tensor
    """Logit of the clean token, 0 where another rank holds it."""
    total: Tensor | None
    """Sum of counted logits; None without an own column."""
    table: Tensor
    """What later passes work on [m, W]: e^(z - max), or the logits still."""
    bias: Tensor | None = None
    """What is to be added to a table that holds logits still, [W]."""


class Coefficients(NamedTuple):
    """d/dz_y = exp * e^(z_y - max) + rest + target * [y = target], but 0 for the own column."""

    exp: Tensor
    rest: Tensor
    target: Tensor


class LawCoefficients(NamedTuple):
    """d/dz_y = w_y (w - share / (1 + w_y)) + target * [y = target], but `own` for the own column.

    Where w_y = e^(z_y - max), with the `max` that `chunk_law` returns.
    """

    w: Tensor
    share: Tensor
    target: Tensor
    own: Tensor


def chunk_statistics(
    logits_mW: Tensor, columns: RowColumns, bias_W: Tensor | None = None
) -> ChunkStatistics:
    """Statistics of each row over its counted columns; the logits may be overwritten.

    A logit that is not a number, or is positive infinity, makes its row's sum_exp not a number.

    Args:
        bias_W: is added to each row; only where `has_kernel` says so.
    """
    if has_kernel(logits_mW):
        return _kernel_statistics(logits_mW, columns, bias_W)
    assert bias_W is None
    return _torch_statistics(logits_mW, columns)


def chunk_law(
    statistics: ChunkStatistics, columns: RowColumns, scale_m: Tensor
) -> tuple[ChunkStatistics, Tensor, Tensor]:
    """The statistics with a `max` that takes in a row's scale, and two sums over counted columns.

    With w = scale * e^(z - max) they are those of ln(1 + w) and of w / (1 + w), [m] each.
    """
    law = _kernel_law if has_kernel(statistics.table) else _torch_law
    return law(statistics, columns, scale_m)


def chunk_gradient(
    statistics: ChunkStatistics,
    columns: RowColumns,
    coefficients: Coefficients | LawCoefficients,
    out_mW: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient [m, W] that the coefficients describe, written to `out_mW`, which is returned.

    That may be where the logits were. And the sums of its columns [W], before they are rounded.
    """
    if has_kernel(statistics.table):
        return out_mW, _kernel_gradient(statistics, columns, coefficients, out_mW)
    if isinstance(coefficients, LawCoefficients):
        grad_mW = _torch_law_gradient(statistics.table, columns, coefficients)
    else:
        grad_mW = _torch_gradient(statistics.table, columns, coefficients)
    if grad_mW.untyped_storage()._cdata != out_mW.untyped_storage()._cdata:
        out_mW.copy_(grad_mW)
    return out_mW, grad_mW.sum(0)


def has_kernel(table_mW: Tensor) -> bool:
    """Whether the kernels do the work, which also add a bias in passing."""
    return (
        table_mW.is_cuda
        and table_mW.dtype in (torch.float32, torch.bfloat16)
        and table_mW.shape[1] > 0
        and compiles_kernels()
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _torch_statistics(logits_mW: Tensor, columns: RowColumns) -> ChunkStatistics:
    table_mW = logits_mW if logits_mW.dtype == torch.float64 else logits_mW.float()
    if not table_mW.shape[1]:  # a rank of padding only
        nothing_m = table_mW.sum(1)
        lowest_m = torch.full_like(nothing_m, _LOWEST)
        total_m = None if columns.own is None else nothing_m
        return ChunkStatistics(lowest_m, nothing_m, nothing_m, total_m, table_mW)
    target_m = entries(table_mW, columns.target)
    total_m = None
    if columns.own is not None:
        set_entries(table_mW, columns.own, 0.0)
        total_m = table_mW.sum(1)
        set_entries(table_mW, columns.own, -torch.inf)
    max_m = table_mW.amax(1).clamp_min(_LOWEST)
    exp_mW = table_mW.sub_(max_m[:, None]).exp_()
    return ChunkStatistics(max_m, exp_mW.sum(1), target_m, total_m, exp_mW)


def _torch_gradient(grad_mW: Tensor, columns: RowColumns, coefficients: Coefficients) -> Tensor:
    if not grad_mW.shape[1]:
        return grad_mW
    grad_mW.mul_(coefficients.exp[:, None])
    if columns.own is not None:
        grad_mW.add_(coefficients.rest[:, None])
    added_m = torch.where(columns.target >= 0, coefficients.target, 0.0)
    grad_mW.scatter_add_(1, columns.target.clamp_min(0)[:, None], added_m[:, None])
    if columns.own is not None:
        set_entries(grad_mW, columns.own, 0.0)
    return grad_mW


def _torch_law(
    statistics: ChunkStatistics, columns: RowColumns, scale_m: Tensor
) -> tuple[ChunkStatistics, Tensor, Tensor]:
    w_mW = statistics.table.mul_(scale_m[:, None])  # 0 for the own column, which adds nothing
    passing_mW = w_mW.log1p()
    log_total_m = passing_mW.sum(1)
    return statistics, log_total_m, passing_mW.neg_().expm1_().sum(1).neg_()


def _torch_law_gradient(w_mW: Tensor, columns: RowColumns, coefficients: LawCoefficients) -> Tensor:
    slope_mW = w_mW.add(1.0)
    w_m1, share_m1 = coefficients.w[:, None], coefficients.share[:, None]
    torch.addcdiv(w_m1, share_m1, slope_mW, value=-1.0, out=slope_mW)
    grad_mW = w_mW.mul_(slope_mW)
    at_target_m = entries(grad_mW, columns.target) + coefficients.target
    set_entries(grad_mW, columns.target, at_target_m)
    assert columns.own is not None
    set_entries(grad_mW, columns.own, coefficients.own)
    return grad_mW


def entries(table_mW: Tensor, column_m: Tensor, missing: float = 0.0) -> Tensor:
    """Each row's entry at its column, `missing` where another rank holds it, [m]."""
    if not table_mW.shape[1]:
        return torch.full_like(table_mW.sum(1), missing)
    entry_m = table_mW.gather(1, column_m.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(column_m >= 0, entry_m, missing)


def set_entries(table_mW: Tensor, column_m: Tensor, value_m: Tensor | float) -> None:
    """Set each row's entry at its column, where this rank holds it."""
    if not table_mW.shape[1]:
        return
    column_m1 = column_m.clamp_min(0)[:, None]
    kept_m = table_mW.gather(1, column_m1).squeeze(1)
    set_m = torch.where(column_m >= 0, value_m, kept_m)
    table_mW.scatter_(1, column_m1, set_m[:, None])


def _kernel_statistics(
    logits_mW: Tensor, columns: RowColumns, bias_W: Tensor | None
) -> ChunkStatistics:
    from sedd_scale.parallel.score_kernel_triton import statistics_kernel

    num_rows, num_columns = logits_mW.shape
    # Four tensors: rows of one would begin at places that suit narrow accesses only.
    max_m, sum_exp_m, target_m, total_m = (
        torch.empty(num_rows, dtype=torch.float32, device=logits_mW.device) for _ in range(4)
    )
    statistics_kernel[(num_rows,)](
        logits_mW,
        logits_mW.stride(0),
        num_columns,
        bias_W,
        columns.target,
        columns.own,
        max_m,
        sum_exp_m,
        target_m,
        total_m,
        LOWEST=_LOWEST,
        HAS_BIAS=bias_W is not None,
        HAS_OWN=columns.own is not None,
        BLOCK=STATISTICS_BLOCK,
        num_warps=NUM_WARPS,
    )
    counted_m = None if columns.own is None else total_m
    return ChunkStatistics(max_m, sum_exp_m, target_m, counted_m, logits_mW, bias_W)


def _kernel_law(
    statistics: ChunkStatistics, columns: RowColumns, scale_m: Tensor
) -> tuple[ChunkStatistics, Tensor, Tensor]:
    from sedd_scale.parallel.score_kernel_triton import law_kernel

    table_mW = statistics.table
    num_rows, num_columns = table_mW.shape
    statistics = statistics._replace(max=statistics.max - scale_m.log())
    log_total_m, share_total_m = (torch.empty_like(statistics.max) for _ in range(2))
    law_kernel[(num_rows,)](
        table_mW,
        table_mW.stride(0),
        num_columns,
        statistics.bias,
        columns.own,
        statistics.max,
        log_total_m,
        share_total_m,
        HAS_BIAS=statistics.bias is not None,
        BLOCK=STATISTICS_BLOCK,
        num_warps=NUM_WARPS,
    )
    return statistics, log_total_m, share_total_m


def _kernel_gradient(
    statistics: ChunkStatistics,
    columns: RowColumns,
    coefficients: Coefficients | LawCoefficients,
    out_mW: Tensor,
) -> Tensor:
    from sedd_scale.parallel.score_kernel_triton import gradient_kernel

    table_mW = statistics.table
    num_rows, num_columns = table_mW.shape
    groups = -(-num_rows // GRADIENT_ROWS)
    sums_gW = torch.empty(groups, num_columns, dtype=torch.float32, device=table_mW.device)
    of_law = isinstance(coefficients, LawCoefficients)
    gradient_kernel[(groups, -(-num_columns // GRADIENT_BLOCK))](
        table_mW,
        table_mW.stride(0),
        out_mW,
        out_mW.stride(0),
        num_rows,
        num_columns,
        statistics.bias,
        columns.target,
        columns.own,
        statistics.max,
        *coefficients,
        *(() if of_law else (None,)),
        sums_gW,
        HAS_BIAS=statistics.bias is not None,
        HAS_OWN=columns.own is not None,
        OF_LAW=of_law,
        ROWS=GRADIENT_ROWS,
        BLOCK=GRADIENT_BLOCK,
        num_warps=NUM_WARPS,
    )
    return sums_gW.sum(0)
