"""The norm's backward pass by its Triton kernel, run by Triton's interpreter.

    TRITON_INTERPRET=1 python norm_kernel_worker.py FILE

Interpreting is decided when Triton is imported, so it needs a process of its own.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.model import fused, norm_kernel


class NormCase(NamedTuple):
    """Sizes, types and what is given."""

    length: int
    batch: int
    width: int
    stream: torch.dtype
    weights: torch.dtype
    has_stream_gradient: bool
    segments: int = 1

    def arguments(self) -> tuple[Tensor | None, ...]:
        """What the forward pass leaves for the backward pass, which is given gradients beside."""
        generator = torch.Generator().manual_seed(self.width)
        shape: tuple[int, ...] = (self.length, self.batch, self.width)
        vector: tuple[int, ...] = shape[1:]
        if self.segments > 1:
            shape, vector = (self.segments, *shape), (self.segments, 1, *vector)

        def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        hidden, scale = 3 * of(*shape, dtype=self.stream) + 1, of(*vector)
        keeps = self.stream == self.weights
        _, kept, rstd = fused._norm_forward(hidden, scale, scale, 1e-5, self.weights, keeps)
        of_stream = (hidden, kept) if keeps else (kept, None)
        grad, beside = of(*shape, dtype=self.weights), of(*shape, dtype=self.stream)
        return grad, beside if self.has_stream_gradient else None, *of_stream, rstd, scale


CASES = [
    NormCase(length, batch, width, stream, weights, given)
    # One program, several groups of positions, a last group that is not full; widths of all kinds.
    for length, batch, width in ((1, 1, 8), (5, 3, 24), (70, 32, 48), (3, 2, 1025))
    for stream, weights in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    )
    for given in (True, False)
] + [NormCase(35, 4, 48, torch.bfloat16, torch.bfloat16, True, segments=3)]


if __name__ == "__main__":
    norm_kernel.FULL_GPU = 64  # so that a program has several positions here too
    torch.save(
        [norm_kernel.norm_backward(*case.arguments(), case.stream) for case in CASES],
        Path(sys.argv[1]),
    )
