"""What damaged training text costs: planted label noise and missing tokens.

    python -m sedd_scale.experiments.robustness --output runs/robustness

The source is that of `support_coverage`, whose ratios are known. Training sequences are damaged:
with `noise` each token is replaced by a random one at the given rate, with `missing` each is left
out, and the chain's next ones close up. Scores are compared with the ratios of the source itself,
so the error at rate 0 is that of training and the rest is the damage's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sedd_scale.experiments.report_files import write_report_files
from sedd_scale.experiments.support_coverage import LENGTH, TOKENS, chain_law, drawn, outside_of


def damaged(kind: str, rate: float) -> Callable[[int, Any], Any]:
    """A draw of damaged sequences [count, LENGTH], for `measure`."""
    import torch

    def with_noise(count: int, generator: Any) -> Any:
        clean_BL = drawn(count, generator)
        hit_BL = torch.rand(clean_BL.shape, generator=generator) < rate
        other_BL = torch.randint(TOKENS, clean_BL.shape, generator=generator)
        return torch.where(hit_BL, other_BL, clean_BL)

    def with_gaps(count: int, generator: Any) -> Any:
        first_N, follow_NN = chain_law()
        token_B = torch.multinomial(first_N, count, replacement=True, generator=generator)
        rows: list[list[int]] = [[] for _ in range(count)]
        while min(map(len, rows)) < LENGTH:
            kept_B = torch.rand(count, generator=generator) >= rate
            for row, token, kept in zip(rows, token_B.tolist(), kept_B.tolist(), strict=True):
                if kept:
                    row.append(token)
            token_B = torch.multinomial(follow_NN[token_B], 1, generator=generator).squeeze(1)
        return torch.tensor([row[:LENGTH] for row in rows])

    return {"noise": with_noise, "missing": with_gaps}[kind]


def write_report(rows: list[dict[str, Any]], output: Path, *, steps: int, command: str) -> None:
    """report.json, report.md and report.png."""
    lines = [
        "# Robustness: errors of learned scores after training on damaged sequences",
        "",
        f"{steps:,} steps of 256 sequences, log-linear noise; errors are against the undamaged "
        "source.",
        "",
        "| graph | damage | rate | log error | outside the support |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['graph']} | {row['damage']} | {row['rate']} | {row['log_error']:.4f} | "
            f"{outside_of(row)} |"
        )

    def draw(axes: Any) -> None:
        for graph, kind in dict.fromkeys((row["graph"], row["damage"]) for row in rows):
            own = [row for row in rows if (row["graph"], row["damage"]) == (graph, kind)]
            rates, errors = [row["rate"] for row in own], [row["log_error"] for row in own]
            axes.plot(rates, errors, marker="o", label=f"{graph}, {kind}")
        axes.set_xlabel("rate of damage")
        axes.set_ylabel("mean error of log scores, nats")
        axes.legend(frameon=False)

    report = {"steps": steps, "rows": rows}
    write_report_files(output, report, lines, draw, command=command, picture="errors over the rate")
