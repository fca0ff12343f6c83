"""The kernels of `score_kernel`, in Triton; imported where they run.

Whole blocks of columns are read and written without a mask, 16 bytes at a time; the last block of a
row has one. Every sum has one order, the same in every run.
"""

import triton
import triton.language as tl


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    num_columns,
    bias,
    target,
    own,
    max_out,
    sum_exp_out,
    target_out,
    total_out,
    LOWEST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: a running maximum, with the sum of exponentials rescaled as it grows."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    own_column = tl.load(own + row) if HAS_OWN else -1
    top = tl.full([], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    totals = tl.zeros([BLOCK], dtype=tl.float32)
    whole = num_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_logits + column).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + column).to(tl.float32)
        if HAS_OWN:
            totals += tl.where(column != own_column, z, 0.0)
            z = tl.where(column != own_column, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        sums = sums * tl.exp(top - new_top) + tl.exp(z - new_top)
        top = new_top
    if whole < num_columns:
        column = whole + tl.arange(0, BLOCK)
        inside = column < num_columns
        z = tl.load(row_logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        counted = inside & (column != own_column)
        if HAS_OWN:
            totals += tl.where(counted, z, 0.0)
        z = tl.where(counted, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        sums = sums * tl.exp(top - new_top) + tl.exp(z - new_top)
        top = new_top
    target_column = tl.load(target + row)
    held = target_column >= 0
    target_logit = tl.load(row_logits + target_column, mask=held, other=0.0).to(tl.float32)
    if HAS_BIAS:
        target_logit += tl.load(bias + target_column, mask=held, other=0.0).to(tl.float32)
    tl.store(max_out + row, top)
    tl.store(sum_exp_out + row, tl.sum(sums, 0))
    tl.store(target_out + row, target_logit)
    if HAS_OWN:
        tl.store(total_out + row, tl.sum(totals, 0))


@triton.jit
def law_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    num_columns,
    bias,
    own,
    row_max,
    log_total_out,
    share_total_out,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: with w = e^(z - max) the sums of ln(1 + w) and of w / (1 + w)."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    own_column = tl.load(own + row)
    top = tl.load(row_max + row)
    logs = tl.zeros([BLOCK], dtype=tl.float32)
    shares = tl.zeros([BLOCK], dtype=tl.float32)
    whole = num_columns // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row_logits + column).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + column).to(tl.float32)
        w = tl.where(column != own_column, tl.exp(z - top), 0.0)
        logs += _log1p(w)
        shares += w / (1.0 + w)
    if whole < num_columns:
        column = whole + tl.arange(0, BLOCK)
        inside = column < num_columns
        z = tl.load(row_logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.where(inside & (column != own_column), tl.exp(z - top), 0.0)
        logs += _log1p(w)
        shares += w / (1.0 + w)
    tl.store(log_total_out + row, tl.sum(logs, 0))
    tl.store(share_total_out + row, tl.sum(shares, 0))


@triton.jit
def _log1p(w):  # type: ignore[no-untyped-def]
    """ln(1 + w), w >= 0, to a few roundings: the logarithm, mended for what 1 + w has lost of w."""
    rounded = 1.0 + w
    lost = tl.where(w < 1.0, w - (rounded - 1.0), 1.0 - (rounded - w))
    return tl.log(rounded) + lost / rounded


@triton.jit
def _gradient_of_rows(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    out,
    out_stride,
    num_columns,
    bias,
    target,
    own,
    row_max,
    exp_coefficient,
    rest_coefficient,
    target_coefficient,
    own_coefficient,
    first,
    last,
    start,
    HAS_BIAS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    OF_LAW: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Logits in, their gradient out, for one block of columns of some rows; the sums of columns.

    OF_LAW: the coefficients are a `LawCoefficients`, else a `Coefficients`.
    """
    column = start + tl.arange(0, BLOCK)
    inside = column < num_columns
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    added = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_BIAS:
        if MASKED:
            added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        else:
            added = tl.load(bias + column).to(tl.float32)
    group = logits + first.to(tl.int64) * row_stride
    out_group = out + first.to(tl.int64) * out_stride
    for step in range(0, last - first):
        row = first + step
        place = group + step * row_stride + column
        if MASKED:
            z = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
        else:
            z = tl.load(place).to(tl.float32)
        z += added
        gradient = tl.exp(z - tl.load(row_max + row))
        if OF_LAW:
            share = tl.load(rest_coefficient + row) / (1.0 + gradient)
            gradient *= tl.load(exp_coefficient + row) - share
        else:
            gradient *= tl.load(exp_coefficient + row)
            if HAS_OWN:
                gradient += tl.load(rest_coefficient + row)
        at_target = column == tl.load(target + row)
        gradient += tl.where(at_target, tl.load(target_coefficient + row), 0.0)
        if HAS_OWN:
            of_own = tl.load(own_coefficient + row) if OF_LAW else 0.0
            gradient = tl.where(column == tl.load(own + row), of_own, gradient)
        out_place = out_group + step * out_stride + column
        if MASKED:
            gradient = tl.where(inside, gradient, 0.0)
            tl.store(out_place, gradient.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out_place, gradient.to(out.dtype.element_ty))
        sums += gradient
    return sums


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    out,
    out_stride,
    num_rows,
    num_columns,
    bias,
    target,
    own,
    row_max,
    exp_coefficient,
    rest_coefficient,
    target_coefficient,
    own_coefficient,
    sums_out,
    HAS_BIAS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    OF_LAW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block of columns of ROWS rows; sums_out is [groups of rows, columns]."""
    group = tl.program_id(0)
    first = group * ROWS
    last = tl.minimum(first + ROWS, num_rows)
    start = tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    place = sums_out + group.to(tl.int64) * num_columns + column
    if start + BLOCK <= num_columns:
        sums = _gradient_of_rows(
            logits,
            row_stride,
            out,
            out_stride,
            num_columns,
            bias,
            target,
            own,
            row_max,
            exp_coefficient,
            rest_coefficient,
            target_coefficient,
            own_coefficient,
            first,
            last,
            start,
            HAS_BIAS=HAS_BIAS,
            HAS_OWN=HAS_OWN,
            OF_LAW=OF_LAW,
            MASKED=False,
            BLOCK=BLOCK,
        )
        tl.store(place, sums)
    else:
        sums = _gradient_of_rows(
            logits,
            row_stride,
            out,
            out_stride,
            num_columns,
            bias,
            target,
            own,
            row_max,
            exp_coefficient,
            rest_coefficient,
            target_coefficient,
            own_coefficient,
            first,
            last,
            start,
            HAS_BIAS=HAS_BIAS,
            HAS_OWN=HAS_OWN,
            OF_LAW=OF_LAW,
            MASKED=True,
            BLOCK=BLOCK,
        )
        tl.store(place, sums, mask=column < num_columns)
