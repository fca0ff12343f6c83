"""The chunk's statistics and gradient by the Triton kernels, run by Triton's interpreter.

    TRITON_INTERPRET=1 python score_kernel_worker.py FILE

Interpreting is decided when Triton is imported, so it needs a process of its own. What the kernels
found for every case goes to FILE.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedd_scale.parallel import score_kernel, vocab
from sedd_scale.parallel.score_kernel import (
    ChunkStatistics,
    Coefficients,
    LawCoefficients,
    RowColumns,
    chunk_gradient,
    chunk_law,
    chunk_statistics,
)
from tests.parallel.vocab_worker import KINDS, loss_on_shard, make_problem


class ChunkCase(NamedTuple):
    """A chunk of logits with odd sizes and places."""

    num_rows: int
    num_columns: int
    with_own: bool
    dtype: torch.dtype


CHUNKS = [
    ChunkCase(num_rows, num_columns, with_own, dtype)
    for num_rows, num_columns in ((1, 1), (3, 2), (7, 50), (2, 4096), (5, 4097), (3, 9001))
    for with_own in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
]
LOSSES = [
    (name, scaled, dtype) for name, scaled in KINDS for dtype in (torch.float32, torch.bfloat16)
]


def make_chunk(case: ChunkCase) -> tuple[Tensor, RowColumns, Coefficients]:
    """Logits in a wider buffer; columns held elsewhere, shared by target and own, and -inf."""
    generator = torch.Generator().manual_seed(case.num_columns)
    num_rows, num_columns = case.num_rows, case.num_columns
    buffer = 4 * torch.randn(num_rows, num_columns + 3, generator=generator)
    logits_mW = buffer.to(case.dtype)[:, :num_columns]
    target_m, own_m = torch.randint(num_columns, (2, num_rows), generator=generator)
    if num_rows > 2:
        target_m[0] = own_m[1] = -1
        own_m[2] = target_m[2]
        logits_mW[1] -= 80.0  # a shift that the maximum must take away
        logits_mW[:, num_columns // 2] = -torch.inf
    target_m[target_m == num_columns // 2] = -1  # a clean token of score zero costs infinitely
    coefficients = Coefficients(*torch.randn(3, num_rows, generator=generator))
    return logits_mW, RowColumns(target_m, own_m if case.with_own else None), coefficients


def bias_of(case: ChunkCase) -> Tensor | None:
    """A bias for each column, where one rounding of its sum with a logit is all there is."""
    if case.dtype != torch.float32:
        return None
    return torch.linspace(-1.0, 2.0, case.num_columns)


class ChunkResults(NamedTuple):
    """What the passes over a chunk find."""

    statistics: ChunkStatistics
    """Without their table."""
    gradient: Tensor
    column_sums: Tensor
    law: tuple[Tensor, ...] | None
    """Where there is an own column: the two sums of w, the gradient, the sums of its columns."""


def law_of(case: ChunkCase) -> tuple[Tensor, LawCoefficients]:
    """What w is of e^(z - max) in each row, from little to much, and coefficients."""
    generator = torch.Generator().manual_seed(case.num_columns + 1)
    scale_m = torch.logspace(-3, 3, case.num_rows)
    return scale_m, LawCoefficients(*torch.randn(4, case.num_rows, generator=generator))


def run_chunk(case: ChunkCase) -> ChunkResults:
    """All passes over the chunk.

    In float32 there is a bias, which the kernels add themselves; PyTorch is given the sum.
    """
    logits_mW, columns, coefficients = make_chunk(case)
    bias_W = bias_of(case)
    if bias_W is not None and not score_kernel.has_kernel(logits_mW):
        logits_mW += bias_W
        bias_W = None
    again_mW, law = logits_mW.clone(), None
    statistics = chunk_statistics(logits_mW, columns, bias_W)
    gradient_mW, sums_W = chunk_gradient(statistics, columns, coefficients, logits_mW)
    if case.with_own:
        scale_m, law_coefficients = law_of(case)
        start = chunk_statistics(again_mW, columns, bias_W)
        scaled, *totals = chunk_law(start, columns, scale_m)
        # To another tensor, of another type than the logits where these are float32.
        out_mW = torch.empty(again_mW.shape, dtype=torch.bfloat16)
        law = (*totals, *chunk_gradient(scaled, columns, law_coefficients, out_mW))
    statistics = statistics._replace(table=torch.empty(0), bias=None)
    return ChunkResults(statistics, gradient_mW, sums_W, law)


def run_loss(name: str, scaled: bool, dtype: torch.dtype, device: str = "cpu") -> Any:
    """Losses and gradients of the whole operation, in several chunks."""
    problem = make_problem(name, scaled, 101, dtype=dtype, length=5)
    parts = {
        key: getattr(problem, key).to(device)
        for key in ("hidden_LBH", "weight", "bias", "clean_BL", "noisy_BL", "noise_B3")
    }
    problem = problem._replace(**parts)
    shard = problem.shard(chunk_bytes=1)
    return loss_on_shard(problem, shard, problem.weight, problem.bias)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    # On a machine without a GPU the kernels are to be taken all the same.
    score_kernel.has_kernel = vocab.has_kernel = lambda table_mW: table_mW.dtype != torch.float64
    found = {
        "chunks": [run_chunk(case) for case in CHUNKS],
        "losses": [run_loss(*case) for case in LOSSES],
    }
    torch.save(found, path)


if __name__ == "__main__":
    # Results are of classes that the tests import under the module's full name.
    from tests.parallel import score_kernel_worker

    score_kernel_worker.main(Path(sys.argv[1]))
