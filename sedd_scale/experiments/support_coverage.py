"""Does a model learn the ratios of a source that is known, and nothing outside its support?

    sedd-scale experiment coverage --output runs/support_coverage
    sedd-scale experiment robustness --output runs/robustness

A small network is trained on sequences of `known_source`, whole or damaged, and its scores are
compared with the true ratios of the whole source, at times spread over the move probability:

    log error   the mean of |log s - log of the true ratio|, weighted by p_t(x) and the true ratio
    outside     absorb: the share of the scores at masked positions that goes to tokens that cannot
                stand there, beside 0 for the truth

So the error without damage is that of training, and the rest of an error is the damage's.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sedd_scale.config import config_from_dict
from sedd_scale.experiments.known_source import LENGTH, TOKENS, Draw, compare, drawn
from sedd_scale.experiments.report_files import write_report_files
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout


def measure(
    graph: str,
    schedule: str,
    *,
    steps: int,
    seed: int,
    draw: Draw = drawn,
) -> dict[str, Any]:
    """Train one model and compare its scores.

    Args:
        graph: of `GRAPHS`.
        steps: of 256 sequences each.
        seed: of weights and data.
        draw: gives [count, LENGTH] training sequences; those of the source by default.
    """
    start = time.perf_counter()
    name, _, parametrisation = graph.partition("-")
    config = config_from_dict(
        {
            "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "cond_dim": 32,
                      "dropout": 0.0, "vocab_size": TOKENS,
                      "parametrisation": parametrisation or "score"},
            "graph": {"name": name},
            "noise": {"name": schedule, "sigma_max": 8.0},
            "training": {"seed": seed},
        }
    )  # fmt: skip
    model = ScoreModel(config, TOKENS, initialize_layout(), block_length=LENGTH)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    t_min = config.noise.t_min
    for _ in range(steps):
        clean_BL = draw(256, generator)
        u_B = (torch.arange(256) + torch.rand(256, generator=generator)).double() / 256
        loss = model.loss(clean_BL, t_B=t_min + (1 - t_min) * u_B, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
    return {
        "graph": graph,
        "schedule": schedule,
        "seed": seed,
        **compare(model.eval()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def write_coverage(rows: list[dict[str, Any]], output: Path, *, steps: int, command: str) -> None:
    """The report over graphs and schedules: report.json, report.md and report.png."""

    def draw(axes: Any) -> None:
        names = [f"{row['graph']}, {row['schedule']}, seed {row['seed']}" for row in rows]
        axes.barh(names[::-1], [row["log_error"] for row in rows][::-1])
        axes.set_xlabel("mean error of log scores, nats")

    write_report_files(
        output,
        {"steps": steps, "rows": rows},
        [
            "# Support coverage: learned scores beside the true ratios",
            "",
            f"Chain over {TOKENS} tokens, {LENGTH} positions, {steps:,} steps of 256 sequences.",
            "",
            *_table(rows, ("graph", "schedule", "seed")),
        ],
        draw,
        command=command,
        picture="log errors",
        size=(7.0, 0.5 * len(rows) + 1.2),
    )


def write_robustness(rows: list[dict[str, Any]], output: Path, *, steps: int, command: str) -> None:
    """The report over kinds and rates of damage: report.json, report.md and report.png."""

    def draw(axes: Any) -> None:
        for graph, kind in dict.fromkeys((row["graph"], row["damage"]) for row in rows):
            own = [row for row in rows if (row["graph"], row["damage"]) == (graph, kind)]
            rates, errors = [row["rate"] for row in own], [row["log_error"] for row in own]
            axes.plot(rates, errors, marker="o", label=f"{graph}, {kind}")
        axes.set_xlabel("rate of damage")
        axes.set_ylabel("mean error of log scores, nats")
        axes.legend(frameon=False)

    write_report_files(
        output,
        {"steps": steps, "rows": rows},
        [
            "# Robustness: errors of learned scores after training on damaged sequences",
            "",
            f"{steps:,} steps of 256 sequences, log-linear noise; errors are against the undamaged "
            "source.",
            "",
            *_table(rows, ("graph", "damage", "rate")),
        ],
        draw,
        command=command,
        picture="errors over the rate",
    )


def _table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """A Markdown table of the errors of each row, by the keys that tell the rows apart."""
    lines = [
        f"| {' | '.join(keys)} | log error | outside the support |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for row in rows:
        outside = f"{row['outside']:.5f}" if "outside" in row else "everything is possible"
        cells = [*(str(row[key]) for key in keys), f"{row['log_error']:.4f}", outside]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
