"""A plan for people, as tables, and for programs, as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sedd_scale.config import MODEL_AXES, Config, ParallelConfig
from sedd_scale.planning.layouts import LayoutFit, Plan
from sedd_scale.planning.step_time import StepTime
from sedd_scale.quantities import format_count, format_duration

GB = 1e9


def print_step_time(predicted: StepTime, device: str) -> None:
    """Where the time of a step goes, and what limits the layout."""
    print(
        f"\npredicted step on {device}: {predicted.seconds * 1e3:.0f} ms, "
        f"{format_count(predicted.tokens_per_second)} tokens/s, MFU {predicted.mfu:.0%}; "
        f"limited by {predicted.limit}"
    )
    for name, part in sorted(predicted.parts.items(), key=lambda item: -item[1]):
        if part > 0:
            print(f"  {name:<36}{part * 1e3:>9.1f} ms")


def print_plan(config: Config, planned: Plan, *, usable: float, seconds: float) -> None:
    """The configured layout: parameters, memory of its heaviest rank, FLOPs and time."""
    heaviest, states, flops = planned.heaviest, planned.heaviest.states, planned.flops
    training = config.training
    print(f"parameters {planned.total_parameters:>16,}")
    for part, count in planned.parameters.items():
        print(f"  {part:<18}{count:>14,}")
    verdict = "fits" if heaviest.peak <= usable else "does NOT fit"
    print(
        f"\n{planned.gpus} GPU{'s' * (planned.gpus > 1)}: {layout_text(planned)}, "
        f"{training.precision}, {planned.accumulation} "
        f"micro-batch{'es' * (planned.accumulation > 1)} of {training.micro_batch} a rank\n"
        f"heaviest rank, stage {planned.stages.index(heaviest)} of {len(planned.stages)} with "
        f"{heaviest.parameters:,} parameters, in GB:"
    )
    for name, size in (
        ("weights", states.weights),
        ("gradients", states.gradients),
        ("optimizer and EMA", states.optimizer),
        ("reduction buckets", states.buckets),
        ("gathered weights", states.gathered),
        ("activations", heaviest.activations),
        ("stage boundaries", heaviest.boundary),
        ("workspace", heaviest.workspace),
        ("(update workspace)", states.update),
        ("peak", heaviest.peak),
    ):
        print(f"  {name:<20}{size / GB:>10.2f}")
    print(f"  it {verdict} in {usable / GB:.1f} GB")
    print(
        f"\nFLOPs a step: required {flops.required:.4g} (head on {flops.head_rows:.1%} of rows), "
        f"dense {flops.dense:.4g}\n"
        f"  of them attention's {flops.attention:.4g}; without: required "
        f"{flops.required - flops.attention:.4g}, dense {flops.dense - flops.attention:.4g}; "
        f"recomputed besides {flops.recompute:.4g}\n"
        f"model FLOPs a token: {flops.required_per_token:.4g} required, "
        f"{flops.dense_per_token:.4g} dense\n"
        f"{training.steps:,} steps take {format_duration(seconds)}, "
        f"{seconds / training.steps:.3f} s a step"
    )


COLUMNS = (
    "GPUs",
    *MODEL_AXES,
    "data",
    "zero",
    "seq.par",
    "recompute",
    "peak GB",
    "sent GB",
)


def print_layouts(fits: Sequence[LayoutFit], num_rows: int) -> None:
    """The table of layouts, best first, and how many of them fit nowhere."""
    possible = [fit for fit in fits if fit.plan is not None]
    print(
        f"\nfewest GPUs by layout, best first ({len(possible)} of {len(fits)} legal layouts fit):"
    )
    print("  ".join(f"{column:>9}" for column in COLUMNS))
    for fit in possible[: num_rows or None]:
        assert fit.plan is not None
        parallel = fit.parallel
        cells = (
            *(fit.plan.gpus, *parallel.axes.values(), fit.plan.data),
            *(parallel.zero_stage, "yes" if parallel.sequence_parallel else "no"),
            recompute_text(parallel),
            f"{fit.plan.heaviest.peak / GB:.1f}",
            f"{fit.plan.sent_bytes / GB:.1f}",
        )
        print("  ".join(f"{cell:>9}" for cell in cells))
    print("(recompute with *: all but matrix products and attention)")
    if num_rows and len(possible) > num_rows:
        print(f"... {len(possible) - num_rows} more; --rows 0 shows all")


def recompute_text(parallel: ParallelConfig) -> str:
    """Which blocks are recomputed; an asterisk: all but their products."""
    every = parallel.recompute_every
    blocks = {0: "none", 1: "all"}.get(every, f"1 in {every}")
    return blocks + ("*" if every and parallel.recompute_mode == "selective" else "")


def layout_text(planned: Plan) -> str:
    """The layout in words."""
    parallel = planned.parallel
    axes = {**parallel.axes, "data": planned.data}
    text = " x ".join(f"{name} {size}" for name, size in axes.items())
    text += f", ZeRO {parallel.zero_stage}"
    if parallel.sequence_parallel:
        text += ", sequence parallel"
    if parallel.recompute_every:
        text += f", recompute {recompute_text(parallel)}"
    return text


def as_json(
    planned: Plan,
    fits: Sequence[LayoutFit],
    *,
    seconds: float,
    predicted: StepTime | None,
    assumptions: Sequence[str],
) -> dict[str, Any]:
    """Everything printed, in bytes, FLOPs and seconds."""
    return {
        "predicted_step": None if predicted is None else dataclasses.asdict(predicted),
        "parameters": planned.total_parameters,
        "parameters_by_part": planned.parameters,
        **plan_json(planned),
        "stages": [{**dataclasses.asdict(stage), "peak": stage.peak} for stage in planned.stages],
        "flops": dataclasses.asdict(planned.flops),
        "seconds": seconds,
        "layouts": [plan_json(fit.plan) for fit in fits if fit.plan is not None],
        "layouts_that_fit_nowhere": [
            {**dataclasses.asdict(fit.parallel), "least_bytes": fit.least_bytes}
            for fit in fits
            if fit.plan is None
        ],
        "assumptions": list(assumptions),
    }


def plan_json(planned: Plan) -> dict[str, Any]:
    """A layout with its size and its heaviest rank's bytes."""
    return {
        "gpus": planned.gpus,
        **dataclasses.asdict(planned.parallel),
        "data": planned.data,
        "accumulation": planned.accumulation,
        "peak_bytes": planned.heaviest.peak,
        "sent_bytes": planned.sent_bytes,
    }
