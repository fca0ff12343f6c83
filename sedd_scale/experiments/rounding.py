"""What bfloat16 costs the bound of a trained model, and which part of it the logits' rounding is.

    sedd-scale experiment rounding --checkpoint RUN --data FILE --output runs/rounding

The same blocks and draws go through the model four times: all in float32; in float32 but for the
logits, which are rounded to bfloat16; with bfloat16 weights and activations whose products the head
hands out in float32, as GPUs do; and with logits of bfloat16 besides. Differences are of pairs, so
that their errors are those of the rounding alone.
"""

import contextlib
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_scale.evaluation.likelihood import evaluate
from sedd_scale.experiments.report_files import write_report_files
from sedd_scale.interop.pretrained import load_pretrained
from sedd_scale.parallel import vocab

VARIANTS = {
    "float32": (torch.float32, torch.float32),
    "float32, logits bfloat16": (torch.float32, torch.bfloat16),
    "bfloat16, logits float32": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
"""The types of weights with activations, and of logits."""


@contextlib.contextmanager
def _logits_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, the head's sums are made in float32 and handed out rounded to `dtype`."""

    def linear(rows_mH: Tensor, weight: Tensor, bias: Tensor | None, out_mW: Tensor) -> None:
        sums_mW = rows_mH.float() @ weight.float().t()
        if bias is not None:
            sums_mW += bias.float()
        out_mW.copy_(sums_mW.to(dtype))

    with (
        unittest.mock.patch.object(vocab, "_linear", linear),
        unittest.mock.patch.object(vocab, "_logits_dtype", lambda weight: torch.float32),
    ):
        yield


def measure(
    checkpoint: str, data: Path, *, draws: int, max_blocks: int, seed: int
) -> list[dict[str, Any]]:
    """One row a variant: nats per token, and the difference from float32 with its error."""
    model = load_pretrained(checkpoint, device="cpu")
    rows: list[dict[str, Any]] = []
    base_n = np.empty(0)
    for name, (weights, logits) in VARIANTS.items():
        model.to(weights)
        with _logits_of(logits):
            found = evaluate(
                model,
                data=data,
                draws=draws,
                max_blocks=max_blocks,
                seed=seed,
            )
        nats_n = np.asarray(found.block_nats_n)
        base_n = base_n if rows else nats_n
        apart_n = nats_n - base_n
        rows.append(
            {
                "variant": name,
                "nats_per_token": found.nats_per_token,
                "stderr": found.stderr,
                "difference": float(apart_n.mean()),
                "difference_stderr": float(apart_n.std(ddof=1) / len(apart_n) ** 0.5),
                "blocks": found.blocks,
            }
        )
    return rows


def write_rounding(rows: list[dict[str, Any]], output: Path, command: str) -> None:
    """report.md, report.json and report.png of `measure`."""
    lines = [
        "# What bfloat16 costs the bound",
        "",
        f"{rows[0]['blocks']} blocks, the same draws in every row; nats per token.",
        "",
        "| computed in | bound | more than float32 |",
        "|---|---|---|",
    ]
    for row in rows:
        bound = f"{row['nats_per_token']:.5f} ± {row['stderr']:.5f}"
        apart = f"{row['difference']:+.6f} ± {row['difference_stderr']:.6f}"
        lines.append(f"| {row['variant']} | {bound} | {apart} |")

    def draw(axis: Any) -> None:
        axis.barh(
            [row["variant"] for row in rows],
            [row["difference"] for row in rows],
            xerr=[row["difference_stderr"] for row in rows],
        )
        axis.set_xlabel("nats per token above float32")

    write_report_files(
        output, {"rows": rows}, lines, draw, command=command, picture="Differences of the bound"
    )
