"""Backward passes of `fused` in Triton; imported where they run.

Each reads its tensors once: for the gradient of every number, and for sums over positions, whose
order follows from the shapes alone. PyTorch's compiler reads them again for the sums, or compiles
anew for every shape.

L positions, B sequences, H width, F inner width of the MLP, S segments, G groups of positions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of one program at most, programs that fill a GPU, entries that a thread holds at once.
MOST_POSITIONS, FULL_GPU, THREAD_ENTRIES = 64, 1024, 16
# Columns of a program that need not see a whole row.
COLUMNS = 1024


def norm_backward(
    grad_LBH: Tensor,
    stream_grad_LBH: Tensor | None,
    kept_LBH: Tensor,
    mean_LB1: Tensor | None,
    rstd_LB1: Tensor,
    scale_BH: Tensor,
    hidden_dtype: torch.dtype,
    centred: bool,
    wants_shift: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused._norm_backward`; the shift's gradient comes with the others for nothing."""
    width = grad_LBH.shape[-1]
    out_LBH = torch.empty(grad_LBH.shape, dtype=hidden_dtype, device=grad_LBH.device)
    sums, grid, sizes = _sums_of_positions(grad_LBH, 2, triton.next_power_of_2(width))
    norm_backward_kernel[grid](
        grad_LBH.contiguous(),
        None if stream_grad_LBH is None else stream_grad_LBH.contiguous(),
        kept_LBH.contiguous(),
        mean_LB1,
        rstd_LB1,
        scale_BH.contiguous(),
        out_LBH,
        sums,
        HAS_STREAM=stream_grad_LBH is not None,
        OF_STREAM=mean_LB1 is not None,
        CENTRED=centred,
        WIDTH=width,
        **sizes,
    )
    scale_sum, shift_sum = sums.sum(2)
    return out_LBH, scale_sum.view(scale_BH.shape), shift_sum.view(scale_BH.shape)


def gate_backward(
    grad_LBH: Tensor,
    update_LBH: Tensor,
    gate_BH: Tensor,
    bias_H: Tensor | None,
    kept_dropped: bool,
    rate: float,
    *hashes: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `fused._gate_backward`."""
    assert not kept_dropped
    width = grad_LBH.shape[-1]
    out_LBH = torch.empty(update_LBH.shape, dtype=update_LBH.dtype, device=grad_LBH.device)
    num_sums = 1 if bias_H is None else 2
    sums, grid, sizes = _sums_of_positions(grad_LBH, num_sums, min(COLUMNS, _power_of_2(width)))
    programs = (*grid, -(-width // sizes["BLOCK"]))
    gate_backward_kernel[programs](
        grad_LBH.contiguous(),
        update_LBH.contiguous(),
        gate_BH.contiguous(),
        bias_H,
        *(hashes or (None, None, None)),
        out_LBH,
        sums,
        HAS_BIAS=bias_H is not None,
        DROPS=rate > 0,
        THRESHOLD=int(rate * 2**32) - 2**31,
        WIDTH=width,
        **sizes,
    )
    grad_gate_BH = sums[0].sum(1).view(gate_BH.shape).to(gate_BH.dtype)
    grad_bias_H = None if bias_H is None else sums[1].flatten(0, -2).sum(0).to(bias_H.dtype)
    return out_LBH, grad_gate_BH, grad_bias_H


def gelu_backward(grad_LBF: Tensor, inner_LBF: Tensor, bias_F: Tensor) -> tuple[Tensor, Tensor]:
    """As `fused._gelu_backward`."""
    rows, width = grad_LBF.numel() // grad_LBF.shape[-1], grad_LBF.shape[-1]
    out_LBF = torch.empty(grad_LBF.shape, dtype=grad_LBF.dtype, device=grad_LBF.device)
    block = min(COLUMNS, _power_of_2(width))
    in_columns = -(-width // block)
    positions = positions_of_a_program(rows * in_columns)
    groups = -(-rows // positions)
    sums_GF = grad_LBF.new_empty(groups, width, dtype=torch.float32)
    gelu_backward_kernel[(groups, in_columns)](
        grad_LBF.contiguous(),
        inner_LBF.contiguous(),
        bias_F,
        out_LBF,
        sums_GF,
        rows,
        WIDTH=width,
        **shape_of_a_program(block, positions),
    )
    return out_LBF, sums_GF.sum(0).to(bias_F.dtype)


def _power_of_2(number: int) -> int:
    power: int = triton.next_power_of_2(number)
    return power


def _sums_of_positions(
    rows_LBH: Tensor, num_sums: int, block: int
) -> tuple[Tensor, tuple[int, int], dict[str, int]]:
    """A place for what programs sum, [num_sums, S, G, B, H]; their grid; their sizes."""
    *segments, length, batch, width = rows_LBH.shape
    positions = positions_of_a_program(length * batch)
    groups, num_segments = -(-length // positions), math.prod(segments)
    sums = rows_LBH.new_empty(num_sums, num_segments, groups, batch, width, dtype=torch.float32)
    sizes = {"length": length, "batch": batch, "groups": groups}
    return sums, (batch, num_segments * groups), sizes | shape_of_a_program(block, positions)


def positions_of_a_program(rows: int) -> int:
    """As many as leave a GPU full of programs, a power of two."""
    share = max(1, rows // FULL_GPU)
    return min(MOST_POSITIONS, 1 << (share.bit_length() - 1))


def shape_of_a_program(block: int, positions: int) -> dict[str, int]:
    """How many positions it sees, how many at once and in how many columns, and its warps."""
    whole = max(block, 4 * 32 * THREAD_ENTRIES)
    warps = min(32, whole // (32 * THREAD_ENTRIES))
    tile = min(positions, whole // block)
    return {"POSITIONS": positions, "TILE": tile, "BLOCK": block, "num_warps": warps}


@triton.jit
def _read(tensor, place, mask):  # type: ignore[no-untyped-def]
    # Once read, a number is not wanted again.
    return tl.load(tensor + place, mask=mask, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )


@triton.jit
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    stream_grad,
    kept,
    mean,
    rstd,
    scale,
    out,
    sums,
    length,
    batch,
    groups,
    HAS_STREAM: tl.constexpr,
    OF_STREAM: tl.constexpr,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence and group of a segment's positions, a tile of them at a time."""
    sequence, group = tl.program_id(0), tl.program_id(1)
    segment = group // groups
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    of_sequence = (segment * batch + sequence) * WIDTH + column
    factor = tl.load(scale + of_sequence, mask=inside, other=0.0).to(tl.float32)
    scale_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    shift_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    for start in range(0, POSITIONS, TILE):
        position = (group - segment * groups) * POSITIONS + start + tl.arange(0, TILE)
        there = position < length
        row = (segment * length + position).to(tl.int64) * batch + sequence
        place = row[:, None] * WIDTH + column[None, :]
        counted = there[:, None] & inside[None, :]
        g = _read(grad, place, counted)
        n = _read(kept, place, counted)
        inverse = tl.load(rstd + row, mask=there, other=0.0)
        if OF_STREAM:
            middle = tl.load(mean + row, mask=there, other=0.0)
            n = tl.where(counted, (n - middle[:, None]) * inverse[:, None], 0.0)
        scale_sums += g * n
        shift_sums += g
        g = g * factor[None, :]
        along = tl.sum(g * n, 1) / WIDTH
        if CENTRED:
            level = tl.sum(g, 1) / WIDTH
            g = g - level[:, None]
        result = (g - n * along[:, None]) * inverse[:, None]
        if HAS_STREAM:
            result += _read(stream_grad, place, counted)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=counted)
    at = (group.to(tl.int64) * batch + sequence) * WIDTH + column
    whole = tl.num_programs(1).to(tl.int64) * batch * WIDTH
    tl.store(sums + at, tl.sum(scale_sums, 0), mask=inside)
    tl.store(sums + whole + at, tl.sum(shift_sums, 0), mask=inside)


@triton.jit
def gate_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    update,
    gate,
    bias,
    factor,
    offset,
    channel,
    out,
    sums,
    length,
    batch,
    groups,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same programs, for some columns of each row; the mask is that of `dropout.keep_mask`."""
    sequence, group = tl.program_id(0), tl.program_id(1)
    segment = group // groups
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    of_sequence = (segment * batch + sequence) * WIDTH + column
    opening = tl.load(gate + of_sequence, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        of_channel = tl.load(channel + column, mask=inside, other=0)
    gate_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    bias_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    for start in range(0, POSITIONS, TILE):
        position = (group - segment * groups) * POSITIONS + start + tl.arange(0, TILE)
        there = position < length
        row = (segment * length + position).to(tl.int64) * batch + sequence
        place = row[:, None] * WIDTH + column[None, :]
        counted = there[:, None] & inside[None, :]
        g = _read(grad, place, counted)
        dropped = _read(update, place, counted)
        if HAS_BIAS:
            dropped += added[None, :]
        result = g * opening[None, :]
        if DROPS:
            rows_factor = tl.load(factor + row, mask=there, other=0)
            rows_offset = tl.load(offset + row, mask=there, other=0)
            bits = rows_factor[:, None] * of_channel[None, :] + rows_offset[:, None]
            bits = (bits ^ (bits >> 15)) * 0x2C1B3C6D
            dropped = tl.where(bits >= THRESHOLD, dropped, 0.0)
            result = tl.where(bits >= THRESHOLD, result, 0.0)
        gate_sums += g * dropped
        if HAS_BIAS:
            bias_sums += result
        tl.store(out + place, result.to(out.dtype.element_ty), mask=counted)
    at = (group.to(tl.int64) * batch + sequence) * WIDTH + column
    tl.store(sums + at, tl.sum(gate_sums, 0), mask=inside)
    if HAS_BIAS:
        whole = tl.num_programs(1).to(tl.int64) * batch * WIDTH
        tl.store(sums + whole + at, tl.sum(bias_sums, 0), mask=inside)


@triton.jit
def gelu_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    inner,
    bias,
    out,
    sums,
    rows,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per group of rows and block of columns."""
    group = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    bias_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    for start in range(0, POSITIONS, TILE):
        row = group.to(tl.int64) * POSITIONS + start + tl.arange(0, TILE)
        place = row[:, None] * WIDTH + column[None, :]
        counted = (row < rows)[:, None] & inside[None, :]
        g = _read(grad, place, counted)
        x = _read(inner, place, counted) + added[None, :]
        # Of 0.5 x (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
        square = x * x
        tanh = 2.0 * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square)) - 1.0
        slope = 0.7978845608028654 * (1.0 + 0.134145 * square)
        result = g * 0.5 * (1.0 + tanh + x * (1.0 - tanh * tanh) * slope)
        bias_sums += result
        tl.store(out + place, result.to(out.dtype.element_ty), mask=counted)
    at = group.to(tl.int64) * WIDTH + column
    tl.store(sums + at, tl.sum(bias_sums, 0), mask=inside)
