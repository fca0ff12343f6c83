"""The two kernels of `score_kernel`, in Triton."""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def statistics_kernel(
    logits,
    row_stride,
    num_columns,
    target,
    own,
    max_out,
    sum_exp_out,
    target_out,
    total_out,
    LOWEST: tl.constexpr,
    HAS_OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: a running maximum, with the sum of exponentials rescaled as it grows."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    own_column = tl.load(own + row) if HAS_OWN else -1
    top = tl.full([], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    totals = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        counted = (column < num_columns) & (column != own_column)
        z = tl.load(row_logits + column, mask=counted, other=float("-inf")).to(tl.float32)
        if HAS_OWN:
            totals += tl.where(counted, z, 0.0)
        new_top = tl.maximum(top, tl.max(z, 0))
        sums = sums * tl.exp(top - new_top) + tl.exp(z - new_top)
        top = new_top
    target_column = tl.load(target + row)
    held = target_column >= 0
    target_logit = tl.load(row_logits + target_column, mask=held, other=0.0)
    tl.store(max_out + row, top)
    tl.store(sum_exp_out + row, tl.sum(sums, 0))
    tl.store(target_out + row, target_logit.to(tl.float32))
    if HAS_OWN:
        tl.store(total_out + row, tl.sum(totals, 0))


@triton.jit
def gradient_kernel(
    logits,
    row_stride,
    num_columns,
    target,
    own,
    row_max,
    exp_coefficient,
    rest_coefficient,
    target_coefficient,
    HAS_OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of a row's columns: logits in, their gradient out."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    place = logits + row * row_stride + column
    z = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(z - tl.load(row_max + row)) * tl.load(exp_coefficient + row)
    at_target = column == tl.load(target + row)
    if HAS_OWN:
        gradient += tl.load(rest_coefficient + row)
    gradient += tl.where(at_target, tl.load(target_coefficient + row), 0.0)
    if HAS_OWN:
        gradient = tl.where(column == tl.load(own + row), 0.0, gradient)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)
