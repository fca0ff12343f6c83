"""Pictures of runs from their metrics.jsonl: loss, validation, gradient norm, throughput, rate."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sedd_scale.arrays import FloatArray
from sedd_scale.config import load_config
from sedd_scale.data.corpus import Corpus
from sedd_scale.errors import ConfigError, DataError, SeddScaleError
from sedd_scale.tracking.metrics import TIME_KEYS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS_FILE = "metrics.jsonl"
TRAINING_KEYS = ("loss", "grad_norm", "lr", "tokens_per_second")
VALIDATION_KEYS = ("valid_nats_per_token", "valid_stderr")
# How far the smoothed loss looks back: a share of a run's lines, and at least a number of them.
SMOOTHED_SHARE = 0.05
SMOOTHED_LINES = 10


@dataclass(frozen=True)
class RunMetrics:
    """The numbers of one run.

    Attributes:
        name: what the legend calls it.
        training: per line of training `step` and TRAINING_KEYS; NaN where none was recorded.
        validation: per validation `step` and VALIDATION_KEYS.
        unigram_nats: unigram entropy of the validation text in nats/token; None where the run's
            dataset is not there any more.
        by_time: per validation that has it `step` and TIME_KEYS, nats/token.
    """

    name: str
    training: dict[str, FloatArray]
    validation: dict[str, FloatArray]
    unigram_nats: float | None
    by_time: dict[str, FloatArray]


def read_run(run_dir: Path, *, name: str | None = None) -> RunMetrics:
    """Read a run directory.

    A last line without an end is one still being written, and is passed over.

    Raises:
        DataError: no metrics.jsonl there, one without any line, or a line that is malformed.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(
            f"{run_dir} holds no {METRICS_FILE}: give a --run-dir of `sedd-scale train`"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte at offset {error.start} is not UTF-8: restore the file"
        ) from error
    lines = text.split("\n")[:-1]
    training: list[dict[str, Any]] = []
    validation: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line, f"{path}:{number}")
        if "loss" in record:
            training.append(record)
        if "valid_nats_per_token" in record:
            validation.append(record)
    if not training and not validation:
        raise DataError(f"{path} holds no metrics yet: wait for the run's first line")
    return RunMetrics(
        name=name or run_dir.resolve().name,
        training=_columns(training, TRAINING_KEYS),
        validation=_columns(validation, VALIDATION_KEYS),
        by_time=_columns([line for line in validation if TIME_KEYS[0] in line], TIME_KEYS),
        unigram_nats=unigram_entropy_of(run_dir),
    )


def unigram_entropy_of(run_dir: Path) -> float | None:
    """Unigram entropy of a run's validation text in nats/token, from its dataset's index.

    None where the run has no config.yaml, or its dataset is not where that says or has no
    validation split.
    """
    config = run_dir / "config.yaml"
    if not config.is_file():
        return None
    data = load_config(config).data
    try:
        splits = [dataset.splits for dataset in Corpus(data).datasets]
    except SeddScaleError:
        return None
    entries = [split["valid"] for split in splits if "valid" in split]
    tokens = sum(entry["tokens"] for entry in entries)
    if not tokens:
        return None
    # Of a mixture: each dataset's own, weighed by its text.
    return sum(entry["unigram_entropy_nats"] * entry["tokens"] for entry in entries) / tokens


def smooth(values_n: FloatArray, lines: int) -> FloatArray:
    """Exponential average over about `lines` values, its start corrected; NaNs are passed over."""
    decay = 1.0 - 1.0 / max(1, lines)
    smoothed = np.full(len(values_n), math.nan)
    total = weight = 0.0
    for index, value in enumerate(values_n):
        if math.isfinite(value):
            total = decay * total + (1.0 - decay) * value
            weight = decay * weight + (1.0 - decay)
        if weight:
            smoothed[index] = total / weight
    return smoothed


def plot_runs(runs: Sequence[RunMetrics], output: Path) -> None:
    """Draw the runs into one picture; its kind (PNG, PDF, SVG) follows from the name.

    Raises:
        ConfigError: a name that is no picture's, or in no directory.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    kinds = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    kind = output.suffix.lstrip(".")
    if kind not in kinds:
        raise ConfigError(f"--output {output}: a picture's name ends in one of {', '.join(kinds)}")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: directory {output.parent} does not exist; make it")
    figure, axes = pyplot.subplot_mosaic(
        [["loss"] * 4, ["grad_norm", "lr", "tokens_per_second", "by_time"]],
        figsize=(13, 8),
        height_ratios=[2.2, 1],
        layout="constrained",
    )
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        _draw_loss(axes["loss"], run, color, prefix=f"{run.name}: " if len(runs) > 1 else "")
        steps = run.training["step"]
        for key in ("grad_norm", "lr", "tokens_per_second"):
            axes[key].plot(steps, run.training[key], color=color, linewidth=1.2)
        if len(run.by_time["step"]):
            tenths = (np.arange(len(TIME_KEYS)) + 0.5) / len(TIME_KEYS)
            nats = [run.by_time[key][-1] for key in TIME_KEYS]
            axes["by_time"].plot(tenths, nats, "o-", color=color, markersize=3, linewidth=1.2)
    _finish_loss(axes["loss"], runs)
    for key, title in (
        ("grad_norm", "gradient norm, before clipping"),
        ("lr", "learning rate"),
        ("tokens_per_second", "tokens/s"),
        ("by_time", "validation by time, nats/token"),
    ):
        axes[key].set_title(title, fontsize=10)
    if any((run.training["grad_norm"] > 0).any() for run in runs):
        axes["grad_norm"].set_yscale("log")
        axes["grad_norm"].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes["grad_norm"].yaxis.set_major_formatter("{x:g}")
        axes["grad_norm"].yaxis.set_minor_formatter(NullFormatter())
    for key in ("lr", "tokens_per_second"):
        axes[key].set_ylim(bottom=0)
    axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes["tokens_per_second"].yaxis.set_major_formatter("{x:,.0f}")
    for panel in axes.values():
        panel.set_xlabel("time" if panel is axes["by_time"] else "step")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)


def _draw_loss(panel: "Axes", run: RunMetrics, color: str, *, prefix: str) -> None:
    steps, losses = run.training["step"], run.training["loss"]
    if len(steps):
        panel.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
        lines = max(SMOOTHED_LINES, round(SMOOTHED_SHARE * len(losses)))
        smoothed = smooth(losses, lines)
        label = f"{prefix}training loss, smoothed over about {lines} lines"
        panel.plot(steps, smoothed, color=color, linewidth=1.8, label=label)
    checks = run.validation
    if len(checks["step"]):
        panel.errorbar(
            checks["step"],
            checks["valid_nats_per_token"],
            yerr=np.nan_to_num(checks["valid_stderr"]),
            color=color,
            fmt="o",
            markersize=5,
            markeredgecolor="black",
            ecolor="black",
            elinewidth=1,
            capsize=3,
            zorder=3,
            label=f"{prefix}validation bound, ± one standard error",
        )


def _finish_loss(panel: "Axes", runs: Sequence[RunMetrics]) -> None:
    baselines = sorted({run.unigram_nats for run in runs if run.unigram_nats is not None})
    for nats in baselines:
        panel.axhline(nats, color="black", linestyle="--", linewidth=1)
        panel.annotate(
            f"unigram entropy of the validation text, {nats:.3f}",
            (1, nats),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )
    drawn = [run.training["loss"] for run in runs]
    drawn += [run.validation["valid_nats_per_token"] for run in runs]
    finite = np.concatenate(drawn)
    finite = finite[np.isfinite(finite)]
    if len(finite):
        # One bad step must not flatten the rest.
        low = min([float(finite.min()), *baselines])
        high = max([float(np.quantile(finite, 0.99)), *baselines])
        margin = 0.05 * (high - low) or 0.5
        panel.set_ylim(low - margin, high + margin)
    panel.set_ylabel("nats/token")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    panel.set_title(f"score entropy and likelihood bound: {title}")
    panel.legend(loc="upper right", frameon=False)


def _parse(line: str, where: str) -> dict[str, Any]:
    fix = "remove the line or restore the file"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): {fix}") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise DataError(f"{where} is not an object with an integer step: {fix}")
    for key in (*TRAINING_KEYS, *VALIDATION_KEYS, *TIME_KEYS):
        value = record.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise DataError(f"{where}: {key}={value!r} is no number: {fix}")
    return record


def _columns(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, FloatArray]:
    return {
        key: np.array(
            [math.nan if record.get(key) is None else record[key] for record in records],
            dtype=np.float64,
        )
        for key in ("step", *keys)
    }
