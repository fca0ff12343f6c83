"""The backward pass of a modulated norm in Triton; imported where it runs.

It sums over channels for a row's own gradient and over positions for the scale's and the shift's.
PyTorch's compiler makes two passes of that, each of which reads the tensors.

L positions, B sequences, H width, G groups of positions, S segments of a sequence.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Positions of one program at most, programs that fill a GPU, entries that a thread holds at once.
MOST_POSITIONS, FULL_GPU, THREAD_ENTRIES = 64, 1024, 16


def norm_backward(
    grad_LBH: Tensor,
    stream_grad_LBH: Tensor | None,
    kept_LBH: Tensor,
    mean_LB1: Tensor | None,
    rstd_LB1: Tensor,
    scale_BH: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused._norm_backward`. Every sum has an order that follows from the shapes alone."""
    *segments, length, batch, width = grad_LBH.shape
    num_segments = math.prod(segments)
    positions = positions_of_a_program(length, batch)
    groups = -(-length // positions)
    shape = shape_of_a_program(width, positions)
    out_LBH = torch.empty(grad_LBH.shape, dtype=hidden_dtype, device=grad_LBH.device)
    sums_2SGBH = grad_LBH.new_empty(2, num_segments, groups, batch, width, dtype=torch.float32)
    norm_backward_kernel[(batch, num_segments * groups)](
        grad_LBH.contiguous(),
        None if stream_grad_LBH is None else stream_grad_LBH.contiguous(),
        kept_LBH.contiguous(),
        mean_LB1,
        rstd_LB1,
        scale_BH.contiguous(),
        out_LBH,
        sums_2SGBH,
        length,
        batch,
        groups,
        POSITIONS=positions,
        HAS_STREAM=stream_grad_LBH is not None,
        OF_STREAM=mean_LB1 is not None,
        WIDTH=width,
        **shape,
    )
    scale_sum, shift_sum = sums_2SGBH.sum(2)
    return out_LBH, scale_sum.view(scale_BH.shape), shift_sum.view(scale_BH.shape)


def positions_of_a_program(length: int, batch: int) -> int:
    """As many as leave a GPU full of programs, a power of two."""
    share = max(1, length * batch // FULL_GPU)
    return min(MOST_POSITIONS, 1 << (share.bit_length() - 1))


def shape_of_a_program(width: int, positions: int) -> dict[str, int]:
    """What it holds at once, in positions and channels, and the warps that do."""
    block = triton.next_power_of_2(width)
    whole = max(block, 4 * 32 * THREAD_ENTRIES)
    tile = min(positions, whole // block)
    return {"TILE": tile, "BLOCK": block, "num_warps": min(32, whole // (32 * THREAD_ENTRIES))}


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
    POSITIONS: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    OF_STREAM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sequence and group of a segment's positions, a tile of them at a time."""
    sequence, group = tl.program_id(0), tl.program_id(1)
    segment = group // groups
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(
        scale + (segment * batch + sequence) * WIDTH + column, mask=inside, other=0.0
    ).to(tl.float32)
    scale_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    shift_sums = tl.zeros([TILE, BLOCK], dtype=tl.float32)
    for start in range(0, POSITIONS, TILE):
        position = (group - segment * groups) * POSITIONS + start + tl.arange(0, TILE)
        there = position < length
        row = (segment * length + position).to(tl.int64) * batch + sequence
        place = row[:, None] * WIDTH + column[None, :]
        counted = there[:, None] & inside[None, :]
        # Once read, a number is not wanted again.
        g = tl.load(grad + place, mask=counted, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        n = tl.load(kept + place, mask=counted, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        inverse = tl.load(rstd + row, mask=there, other=0.0)
        if OF_STREAM:
            middle = tl.load(mean + row, mask=there, other=0.0)
            n = tl.where(counted, (n - middle[:, None]) * inverse[:, None], 0.0)
        scale_sums += g * n
        shift_sums += g
        g = g * factor[None, :]
        along = tl.sum(g * n, 1) / WIDTH
        level = tl.sum(g, 1) / WIDTH
        result = (g - level[:, None] - n * along[:, None]) * inverse[:, None]
        if HAS_STREAM:
            result += tl.load(
                stream_grad + place, mask=counted, other=0.0, eviction_policy="evict_first"
            ).to(tl.float32)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=counted)
    at = (group.to(tl.int64) * tl.num_programs(0) + sequence) * WIDTH + column
    whole = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * WIDTH
    tl.store(sums + at, tl.sum(scale_sums, 0), mask=inside)
    tl.store(sums + whole + at, tl.sum(shift_sums, 0), mask=inside)
