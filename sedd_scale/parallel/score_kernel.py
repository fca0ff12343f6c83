"""Statistics of a chunk of logits, and their gradient written over them.

Two passes over the chunk, with room between them for the statistics to cross tensor ranks. Plain
PyTorch defines both; on a GPU with Triton two kernels do the same, which read the logits once for
the statistics, then read and write them once for the gradient.

m rows of a chunk, W columns of this rank's vocabulary shard.
"""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Columns that one program of a kernel works on at once.
_BLOCK = 4096
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
    """What `chunk_gradient` works on [m, W]: e^(z - max), or the logits still."""


class Coefficients(NamedTuple):
    """d/dz_y = exp * e^(z_y - max) + rest + target * [y = target], but 0 for the own column."""

    exp: Tensor
    rest: Tensor
    target: Tensor


def chunk_statistics(logits_mW: Tensor, columns: RowColumns) -> ChunkStatistics:
    """Statistics of each row over its counted columns; the logits may be overwritten.

    A logit that is not a number, or is positive infinity, makes its row's sum_exp not a number.
    """
    return (_kernel_statistics if _has_kernel(logits_mW) else _torch_statistics)(logits_mW, columns)


def chunk_gradient(
    statistics: ChunkStatistics, columns: RowColumns, coefficients: Coefficients
) -> Tensor:
    """The gradient [m, W] that the coefficients describe, written over `statistics.table`."""
    gradient = _kernel_gradient if _has_kernel(statistics.table) else _torch_gradient
    return gradient(statistics, columns, coefficients)


def _has_kernel(table_mW: Tensor) -> bool:
    return (
        table_mW.is_cuda
        and table_mW.dtype in (torch.float32, torch.bfloat16)
        and table_mW.shape[1] > 0
        and _has_triton()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernels() -> Any:
    """The module of the kernels, which needs Triton."""
    from sedd_scale.parallel import score_kernel_triton

    return score_kernel_triton


def _torch_statistics(logits_mW: Tensor, columns: RowColumns) -> ChunkStatistics:
    table_mW = logits_mW if logits_mW.dtype == torch.float64 else logits_mW.float()
    if not table_mW.shape[1]:  # a rank of padding only
        nothing_m = table_mW.sum(1)
        lowest_m = torch.full_like(nothing_m, _LOWEST)
        total_m = None if columns.own is None else nothing_m
        return ChunkStatistics(lowest_m, nothing_m, nothing_m, total_m, table_mW)
    target_m1 = table_mW.gather(1, columns.target.clamp_min(0)[:, None])
    target_m = torch.where(columns.target >= 0, target_m1.squeeze(1), 0.0)
    total_m = None
    if columns.own is not None:
        set_entries(table_mW, columns.own, 0.0)
        total_m = table_mW.sum(1)
        set_entries(table_mW, columns.own, -torch.inf)
    max_m = table_mW.amax(1).clamp_min(_LOWEST)
    exp_mW = table_mW.sub_(max_m[:, None]).exp_()
    return ChunkStatistics(max_m, exp_mW.sum(1), target_m, total_m, exp_mW)


def _torch_gradient(
    statistics: ChunkStatistics, columns: RowColumns, coefficients: Coefficients
) -> Tensor:
    grad_mW = statistics.table
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


def set_entries(table_mW: Tensor, column_m: Tensor, value_m: Tensor | float) -> None:
    """Set each row's entry at its column, where this rank holds it."""
    if not table_mW.shape[1]:
        return
    column_m1 = column_m.clamp_min(0)[:, None]
    kept_m = table_mW.gather(1, column_m1).squeeze(1)
    set_m = torch.where(column_m >= 0, value_m, kept_m)
    table_mW.scatter_(1, column_m1, set_m[:, None])


def _kernel_statistics(logits_mW: Tensor, columns: RowColumns) -> ChunkStatistics:
    num_rows, num_columns = logits_mW.shape
    max_m, sum_exp_m, target_m, total_m = torch.empty(
        4, num_rows, dtype=torch.float32, device=logits_mW.device
    )
    _kernels().statistics_kernel[(num_rows,)](
        logits_mW,
        logits_mW.stride(0),
        num_columns,
        columns.target,
        columns.own,
        max_m,
        sum_exp_m,
        target_m,
        total_m,
        LOWEST=_LOWEST,
        HAS_OWN=columns.own is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    if columns.own is None:
        return ChunkStatistics(max_m, sum_exp_m, target_m, None, logits_mW)
    return ChunkStatistics(max_m, sum_exp_m, target_m, total_m, logits_mW)


def _kernel_gradient(
    statistics: ChunkStatistics, columns: RowColumns, coefficients: Coefficients
) -> Tensor:
    table_mW = statistics.table
    num_rows, num_columns = table_mW.shape
    _kernels().gradient_kernel[(num_rows, -(-num_columns // _BLOCK))](
        table_mW,
        table_mW.stride(0),
        num_columns,
        columns.target,
        columns.own,
        statistics.max,
        *coefficients,
        HAS_OWN=columns.own is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return table_mW
