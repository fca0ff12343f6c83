"""Backward passes by their Triton kernels, run by Triton's interpreter.

    TRITON_INTERPRET=1 python backward_kernels_worker.py FILE

Interpreting is decided when Triton is imported, so it needs a process of its own.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedd_scale.model import backward_kernels, fused
from sedd_scale.model.dropout import dropout

FLOAT, HALF = torch.float32, torch.bfloat16


class Case(NamedTuple):
    """A pass, its sizes and types, and what is given of what may be."""

    name: str
    length: int
    batch: int
    width: int
    stream: torch.dtype
    weights: torch.dtype
    given: bool
    segments: int = 1
    centred: bool = True

    def arguments(self) -> tuple[Any, ...]:
        """What the forward pass leaves for the backward pass, and gradients."""
        generator = torch.Generator().manual_seed(self.width)
        shape: tuple[int, ...] = (self.length, self.batch, self.width)
        vector: tuple[int, ...] = shape[1:]
        if self.segments > 1:
            shape, vector = (self.segments, *shape), (self.segments, 1, *vector)

        def of(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        stream, update = of(*shape, dtype=self.stream), of(*shape, dtype=self.weights)
        bias = of(self.width, dtype=self.weights)
        if self.name == "gelu":
            return update, of(*shape, dtype=self.weights), bias
        if self.name == "gate":
            keys, rate, hashes = torch.arange(self.batch), 0.0, []
            if self.given or self.segments > 1:
                sizes = {"length": self.segments * self.length, "width": self.width}
                rate, *of_rows, of_channels = dropout(
                    keys, **sizes, rate=0.3, site=1, first_position=2
                )
                hashes = [*(rows.view(*shape[:-1], 1) for rows in of_rows), of_channels]
            gate = of(*vector, dtype=self.stream)
            return stream, update, gate, bias if self.given else None, False, rate, *hashes
        hidden, scale = 3 * stream + 1, of(*vector)
        keeps = self.stream == self.weights
        _, kept, rstd = fused._norm_forward(
            hidden, scale, scale, 1e-5, self.weights, keeps, self.centred
        )
        of_stream = (hidden, kept) if keeps else (kept, None)
        beside = of(*shape, dtype=self.stream) if self.given else None
        return update, beside, *of_stream, rstd, scale, self.stream, self.centred

    def found(self) -> tuple[Tensor | None, ...]:
        """By the kernel."""
        found: tuple[Tensor | None, ...] = getattr(backward_kernels, f"{self.name}_backward")(
            *self.arguments()
        )
        return found


# One program, several groups of positions, a last group that is not full; widths of all kinds.
CASES = [
    Case(name, length, batch, width, stream, weights, given)
    for name in ("norm", "gate", "gelu")
    for length, batch, width in ((1, 1, 8), (5, 3, 24), (70, 32, 48), (3, 2, 1025))
    for stream, weights in ((FLOAT, FLOAT), (FLOAT, HALF), (HALF, HALF))
    for given in (True, False)
    if name != "gelu" or (given and stream == weights)
] + [
    *(Case(name, 35, 4, 48, HALF, HALF, name == "norm", segments=3) for name in ("norm", "gate")),
    *(Case("norm", 5, 3, 24, FLOAT, kind, True, centred=False) for kind in (FLOAT, HALF)),
]


if __name__ == "__main__":
    backward_kernels.FULL_GPU = 64  # so that a program has several positions here too
    torch.save([case.found() for case in CASES], Path(sys.argv[1]))
