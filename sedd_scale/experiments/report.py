"""One report of a comparison: a table (Markdown), its numbers (JSON) and a picture (PNG)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_scale.experiments.experiment import Experiment
from sedd_scale.experiments.report_files import write_report_files
from sedd_scale.tracking.plots import RunMetrics, read_run

Result = dict[str, Any]


def summarise(experiment: Experiment, results: Sequence[Result]) -> dict[str, Any]:
    """The numbers of a report, a row per variant, with mean and standard error over seeds.

    Ratios are taken seed by seed, over the baseline of the same seed. With one seed the error over
    seeds is None.
    """
    rows = []
    of_baseline = _by_seed(experiment, results, experiment.baseline)
    base = [result["evaluation"]["bits_per_char"] for result in of_baseline]
    for name in experiment.variants:
        own = _by_seed(experiment, results, name)
        bits = [result["evaluation"]["bits_per_char"] for result in own]
        row: dict[str, Any] = {
            "variant": name,
            "changes": experiment.changes[name],
            "objective": experiment.variants[name].training.objective,
            "graph": experiment.variants[name].graph.name,
            "schedule": experiment.variants[name].noise.name,
            "kind": own[0]["evaluation"]["kind"],
            "bits_per_char": _mean(bits),
            "ratio": _mean([a / b for a, b in zip(bits, base, strict=True)]),
            "stderr_draws": max(
                _in_bits_per_char(result["evaluation"], "stderr") for result in own
            ),
            "perplexity": _mean([result["evaluation"]["perplexity"] for result in own]),
            "train_seconds": _mean([result["train_seconds"] for result in own]),
            "by_seed": dict(zip(map(str, experiment.seeds), bits, strict=True)),
            "starts_from": experiment.starts.get(name),
            "tokens": experiment.tokens_of(name),
        }
        if "normalised_nats_per_token" in own[0]["evaluation"]:
            normalised = [
                _in_bits_per_char(result["evaluation"], "normalised_nats_per_token")
                for result in own
            ]
            row["normalised_bits_per_char"] = _mean(normalised)
            row["normalised_ratio"] = _mean([a / b for a, b in zip(normalised, base, strict=True)])
        rows.append(row)
    training = experiment.variants[experiment.baseline].training
    return {
        "title": experiment.title,
        "baseline": experiment.baseline,
        "seeds": experiment.seeds,
        "steps": training.steps,
        "tokens_per_run": experiment.tokens_per_run,
        "evaluation": vars(experiment.evaluation),
        "evaluated_tokens": of_baseline[0]["evaluation"]["tokens"],
        "variants": rows,
    }


def write_report(
    experiment: Experiment, results: Sequence[Result], output: Path, *, command: str
) -> list[Path]:
    """Write report.json, report.md and report.png into `output`; returns the three."""
    summary = summarise(experiment, results)
    curves = {
        name: [
            read_run(output / "runs" / f"{name}-{seed}" / "run", name=f"{name}-{seed}")
            for seed in experiment.seeds
        ]
        for name in experiment.variants
    }
    tokens_per_step = experiment.tokens_per_run / summary["steps"]
    summary["validation"] = _over_tokens(experiment, results, curves)
    return write_report_files(
        output,
        summary,
        report_lines(summary),
        lambda *axes: _draw(summary, curves, tokens_per_step, *axes),
        command=command,
        picture="validation during training and final bits per character",
        size=(11, 4.2),
        widths=(3, 2),
    )


def report_lines(summary: dict[str, Any]) -> list[str]:
    """The report for people, line by line."""
    seeds = summary["seeds"]
    lines = [
        f"# {summary['title']}",
        "",
        f"{summary['tokens_per_run']:,} tokens per run in {summary['steps']:,} steps, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} "
        f"({', '.join(map(str, seeds))}); evaluated on {summary['evaluated_tokens']:,} tokens with "
        f"{summary['evaluation']['draws']} draws per block. Ratios are to {summary['baseline']} of "
        "the same seed; ± is the standard error over seeds.",
        "",
        "| variant | bits/char | ratio | normalised: bits/char | ratio | likelihood | s/run |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary["variants"]:
        cells = [
            row["variant"],
            _plus_minus(row["bits_per_char"]),
            _plus_minus(row["ratio"]),
            _plus_minus(row.get("normalised_bits_per_char")),
            _plus_minus(row.get("normalised_ratio")),
            "exact" if row["kind"] == "exact" else "upper bound",
            f"{row['train_seconds']['mean']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    points = summary.get("validation")
    if points:
        names = list(points[0]["bits_per_char"])
        lines += [
            "",
            "Validation of the averaged weights during training, bits/char, mean over seeds:",
            "",
            f"| tokens | {' | '.join(names)} |",
            f"|{'---|' * (len(names) + 1)}",
        ]
        for point in points:
            cells = [f"{point['bits_per_char'][name]:.3f}" for name in names]
            lines.append(f"| {point['tokens']:,} | {' | '.join(cells)} |")
    largest = max(row["stderr_draws"] for row in summary["variants"])
    lines += [
        "",
        f"The draws of an evaluation add a standard error of at most {largest:.4f} bits/char.",
        "",
        f"What each variant changes: {'; '.join(map(_changes, summary['variants']))}.",
    ]
    return lines


def _over_tokens(
    experiment: Experiment, results: Sequence[Result], curves: dict[str, list[RunMetrics]]
) -> list[dict[str, Any]]:
    """The validations that all runs compared have made, in bits per character, means over seeds."""
    bits: dict[str, list[dict[int, float]]] = {}
    for name in experiment.variants:
        if name not in experiment.starts.values():
            bits[name] = []
            own = _by_seed(experiment, results, name)
            for result, run in zip(own, curves[name], strict=True):
                of_nats = result["evaluation"]["bits_per_char"]
                of_nats /= result["evaluation"]["nats_per_token"]
                found = run.validation["valid_nats_per_token"] * of_nats
                bits[name].append(dict(zip(map(int, run.validation["step"]), found.tolist())))
    steps = set.intersection(*(set(run) for runs in bits.values() for run in runs))
    tokens_per_step = experiment.tokens_of(experiment.baseline)
    tokens_per_step //= experiment.variants[experiment.baseline].training.steps
    return [
        {
            "tokens": step * tokens_per_step,
            "bits_per_char": {
                name: float(np.mean([run[step] for run in runs])) for name, runs in bits.items()
            },
        }
        for step in sorted(steps)
    ]


def _changes(row: dict[str, Any]) -> str:
    changes = ", ".join(f"`{change}`" for change in row["changes"])
    if row["starts_from"] is not None:
        changes = f"starts from {row['starts_from']}, {changes}"
    return f"{row['variant']} ({row['tokens']:,} tokens): {changes or 'nothing'}"


def _by_seed(experiment: Experiment, results: Sequence[Result], name: str) -> list[Result]:
    """The variant's results in the order of the experiment's seeds."""
    of_seed = {result["seed"]: result for result in results if result["variant"] == name}
    return [of_seed[seed] for seed in experiment.seeds]


def _in_bits_per_char(evaluation: dict[str, Any], key: str) -> float:
    """A number of nats a token in bits a character."""
    share = evaluation[key] / evaluation["nats_per_token"]
    bits: float = evaluation["bits_per_char"] * share
    return bits


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    error = None
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "stderr": error}


def _plus_minus(value: dict[str, float | None] | None) -> str:
    if value is None:
        return ""
    error = value["stderr"]
    return f"{value['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _draw(
    summary: dict[str, Any],
    curves: dict[str, list[RunMetrics]],
    tokens_per_step: float,
    left: Any,
    right: Any,
) -> None:
    """Validation over tokens, a line per seed, and the final numbers with their errors."""
    colours = {name: f"C{number}" for number, name in enumerate(curves)}
    for name, runs in curves.items():
        for number, run in enumerate(runs):
            left.plot(
                run.validation["step"] * tokens_per_step,
                run.validation["valid_nats_per_token"] / math.log(2),
                color=colours[name],
                alpha=1.0 if number == 0 else 0.5,
                label=name if number == 0 else None,
            )
    left.set_xlabel("tokens")
    left.set_ylabel("validation, bits per token")
    left.legend(frameon=False)
    for place, row in enumerate(reversed(summary["variants"])):
        value = row["bits_per_char"]
        right.barh(place, value["mean"], xerr=value["stderr"] or 0.0, color=colours[row["variant"]])
        ratio = row["ratio"]["mean"]
        right.text(value["mean"], place, f"  {value['mean']:.3f} (x {ratio:.3f})", va="center")
    right.set_yticks(
        range(len(summary["variants"])), [row["variant"] for row in reversed(summary["variants"])]
    )
    right.set_xlim(0, 1.35 * max(row["bits_per_char"]["mean"] for row in summary["variants"]))
    right.set_xlabel("bits per character (ratio to the baseline)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.figure.suptitle(summary["title"])
