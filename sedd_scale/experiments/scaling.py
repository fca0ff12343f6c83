"""How bits per character fall with size at equal compute: score entropy beside autoregressive.

    sedd-scale experiment scaling --data books.jsonl.xz --output runs/scaling

Every size is trained with the same FLOPs, so that small networks see more tokens, once for each
objective and seed, and evaluated alike. Through the sizes of an objective goes a power law,
bits = a N^-b with N the parameters of the blocks, fitted to logarithms by least squares; the error
of b comes from the scatter about it. Killed and started again, the same command continues.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd_scale.config import Config
from sedd_scale.errors import ConfigError
from sedd_scale.experiments.report_files import write_report_files

# Each trained as `configs/experiments/text8_style.yaml` does.
_RECIPES = {
    "autoregressive": ("training.objective=autoregressive",),
    "score_entropy": ("noise.name=cosine", "training.weight_softening=0.1"),
}
OBJECTIVES = tuple(_RECIPES)
_SYMBOLS = 27
_HEAD_WIDTH = 32


class PowerLaw(NamedTuple):
    """bits = factor * N^-exponent, and the standard error of the exponent (None: two points)."""

    factor: float
    exponent: float
    stderr: float | None


def fit_power_law(sizes: Sequence[float], bits: Sequence[float]) -> PowerLaw:
    """The least-squares line through logarithms; raises ConfigError for fewer than two sizes."""
    if len(set(sizes)) < 2:
        raise ConfigError("a power law needs at least two sizes: give more to --widths")
    x, y = np.log(sizes), np.log(bits)
    slope, offset = np.polyfit(x, y, 1)
    stderr = None
    if len(x) > 2:
        rest = float(((y - slope * x - offset) ** 2).sum()) / (len(x) - 2)
        stderr = math.sqrt(rest / float(((x - x.mean()) ** 2).sum()))
    return PowerLaw(math.exp(offset), -float(slope), stderr)


def block_parameters(width: int, layers: int) -> int:
    """Matrix entries of the blocks: attention 4 and MLP 8 times the width squared."""
    return 12 * width * width * layers


def flops_per_token(width: int, layers: int, length: int) -> int:
    """Forward and backward: 6 a matrix entry, head included, and 12 a channel and position seen."""
    return 6 * (block_parameters(width, layers) + width * _SYMBOLS) + 12 * layers * length * width


def variants_of(arguments: argparse.Namespace) -> dict[str, Config]:
    """Name -> configuration of every size and objective; --steps are the largest size's."""
    for width in arguments.widths:
        if width < 1 or width % _HEAD_WIDTH:
            raise ConfigError(f"--widths {width}: give multiples of {_HEAD_WIDTH}")
    sizes = {width: max(1, width // _HEAD_WIDTH) for width in sorted(arguments.widths)}
    length = arguments.block_length
    budget = arguments.steps * max(flops_per_token(*size, length) for size in sizes.items())
    made = {}
    for width, layers in sizes.items():
        steps = round(budget / flops_per_token(width, layers, length))
        for objective in OBJECTIVES:
            made[f"{objective}-{width}"] = Config().override(
                f"model.hidden_size={width}",
                f"model.num_layers={layers}",
                f"model.num_heads={layers}",
                "model.cond_dim=64",
                "model.dropout=0",
                "model.rotary_base=30",
                "optimizer.lr=0.002",
                "optimizer.beta2=0.98",
                "optimizer.schedule=cosine",
                f"optimizer.warmup_steps={min(50, steps // 4)}",
                "optimizer.ema_decay=0.99",
                *_RECIPES[objective],
                f"training.steps={steps}",
                "training.global_batch=8",
                "training.micro_batch=8",
                "training.precision=fp32",
                "training.valid_every=0",
            )
    return made


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bits of every run and the power law of each objective."""
    rows = []
    for result in results:
        objective, _, width = result["variant"].rpartition("-")
        rows.append(
            {
                "objective": objective,
                "width": int(width),
                "parameters": block_parameters(int(width), max(1, int(width) // _HEAD_WIDTH)),
                "seed": result["seed"],
                "bits_per_char": result["evaluation"]["bits_per_char"],
                "train_seconds": result["train_seconds"],
            }
        )
    laws = {}
    for objective in OBJECTIVES:
        own = [row for row in rows if row["objective"] == objective]
        law = fit_power_law(
            [row["parameters"] for row in own], [row["bits_per_char"] for row in own]
        )
        laws[objective] = law._asdict()
    return {"rows": rows, "power_laws": laws}


def write_report(summary: dict[str, Any], output: Path, command: str) -> None:
    """report.json, report.md and report.png."""
    lines = [
        "# Scaling at equal compute",
        "",
        "| objective | width | parameters | seed | bits/char |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['objective']} | {row['width']} | {row['parameters']:,} | {row['seed']} | "
        f"{row['bits_per_char']:.4f} |"
        for row in summary["rows"]
    ]
    lines += ["", "| objective | bits = a N^-b: a | b | standard error of b |", "|---|---|---|---|"]
    for objective, law in summary["power_laws"].items():
        error = "two points" if law["stderr"] is None else f"{law['stderr']:.4f}"
        lines.append(f"| {objective} | {law['factor']:.3f} | {law['exponent']:.4f} | {error} |")

    def draw(axes: Any) -> None:
        from matplotlib.ticker import NullLocator, ScalarFormatter

        for objective, law in summary["power_laws"].items():
            own = [row for row in summary["rows"] if row["objective"] == objective]
            sizes = np.array(sorted({row["parameters"] for row in own}), dtype=float)
            (points,) = axes.loglog(
                [row["parameters"] for row in own], [row["bits_per_char"] for row in own], "o"
            )
            fitted = law["factor"] * sizes ** -law["exponent"]
            axes.loglog(sizes, fitted, color=points.get_color(), label=objective)
        every = sorted({row["parameters"] for row in summary["rows"]})
        axes.set_xticks(every, [f"{size:,}" for size in every])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.set_xlabel("parameters of the blocks")
        axes.set_ylabel("bits per character")
        axes.legend(frameon=False)

    write_report_files(
        output, summary, lines, draw, command=command, picture="bits over parameters"
    )
