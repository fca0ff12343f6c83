"""Predict what a run needs before it starts: parameters, memory, FLOPs, time and layouts."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sedd_scale.cli import given_path, make_parser, run_command
from sedd_scale.errors import ConfigError
from sedd_scale.planning.flops import PEAK_FLOPS, run_seconds
from sedd_scale.tracking.console import format_duration

if TYPE_CHECKING:
    from sedd_scale.config import Config, ParallelConfig
    from sedd_scale.planning.layouts import LayoutFit, Plan

GB = 1e9


def plan_command(arguments: argparse.Namespace) -> None:
    """Plan the run on the GPUs given, or on the fewest, and every other legal layout."""
    from sedd_scale.config import load_config
    from sedd_scale.planning.layouts import ASSUMPTIONS, fit_layouts, plan, smallest_fit
    from sedd_scale.planning.sizes import sizes_for_plan

    config = load_config(arguments.config, arguments.overrides)
    gpu = PEAK_FLOPS[arguments.gpu]
    memory = gpu["memory"] if arguments.gpu_memory_gb is None else GB * arguments.gpu_memory_gb
    peak = gpu[config.training.precision]
    if arguments.peak_tflops is not None:
        peak = 1e12 * arguments.peak_tflops
    for name, value in (
        ("--gpu-memory-gb", memory),
        ("--peak-tflops", peak),
        ("--mfu", arguments.mfu),
        ("--usable", arguments.usable),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} has to be a number above 0: give another")
    for name, count, least in (("--gpus", arguments.gpus, 1), ("--rows", arguments.rows, 0)):
        if count is not None and count < least:
            raise ConfigError(f"{name} {count} is too small: give at least {least}")
    vocab_size, block_length = sizes_for_plan(
        config, vocab_size=arguments.vocab_size, block_length=arguments.block_length
    )
    sizes = {"vocab_size": vocab_size, "block_length": block_length}
    usable = arguments.usable * memory

    if arguments.gpus is not None:
        planned = plan(config, arguments.gpus, **sizes)
    else:
        fit = smallest_fit(config, **sizes, usable_bytes=usable)
        most = config.training.global_batch // config.training.micro_batch
        most *= config.parallel.tensor * config.parallel.pipeline
        planned = fit.plan or plan(config, most, **sizes)
    fits = fit_layouts(config, **sizes, usable_bytes=usable)
    seconds = run_seconds(
        planned.flops,
        steps=config.training.steps,
        gpus=planned.gpus,
        peak=peak,
        mfu=arguments.mfu,
    )
    assumptions = (
        *ASSUMPTIONS,
        f"{arguments.usable:.0%} of {memory / GB:g} GB a GPU usable, the rest for CUDA, NCCL and "
        "fragments",
        f"{arguments.mfu:.0%} of {peak / 1e12:g} TFLOP/s a GPU reached",
    )
    print_plan(config, planned, usable=usable, seconds=seconds)
    print_layouts(fits, arguments.rows)
    print("\nassumptions: " + ";\n  ".join(assumptions))
    if arguments.json:
        print(json.dumps(as_json(planned, fits, seconds=seconds, assumptions=assumptions)))


def print_plan(config: "Config", planned: "Plan", *, usable: float, seconds: float) -> None:
    """The configured layout: parameters, memory of its heaviest rank, FLOPs and time."""
    heaviest, states, flops = planned.heaviest, planned.heaviest.states, planned.flops
    training = config.training
    print(f"parameters {planned.total_parameters:>16,}")
    for part, count in planned.parameters.items():
        print(f"  {part:<18}{count:>14,}")
    verdict = "fits" if heaviest.peak <= usable else "does NOT fit"
    print(
        f"\n{planned.gpus} GPUs: {layout_text(planned)}, {training.precision}, "
        f"{planned.accumulation} micro-batches of {training.micro_batch} a rank\n"
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
    "tensor",
    "pipeline",
    "data",
    "zero",
    "seq.par",
    "recompute",
    "peak GB",
    "sent GB",
)


def print_layouts(fits: "Sequence[LayoutFit]", num_rows: int) -> None:
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
            *(fit.plan.gpus, parallel.tensor, parallel.pipeline, fit.plan.data),
            *(parallel.zero_stage, "yes" if parallel.sequence_parallel else "no"),
            recompute_text(parallel),
            f"{fit.plan.heaviest.peak / GB:.1f}",
            f"{fit.plan.sent_bytes / GB:.1f}",
        )
        print("  ".join(f"{cell:>9}" for cell in cells))
    print("(recompute with *: all but matrix products and attention)")
    if num_rows and len(possible) > num_rows:
        print(f"... {len(possible) - num_rows} more; --rows 0 shows all")


def recompute_text(parallel: "ParallelConfig") -> str:
    """Which blocks are recomputed; an asterisk: all but their products."""
    every = parallel.recompute_every
    blocks = {0: "none", 1: "all"}.get(every, f"1 in {every}")
    return blocks + ("*" if every and parallel.recompute_mode == "selective" else "")


def layout_text(planned: "Plan") -> str:
    """The layout in words."""
    parallel = planned.parallel
    text = (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {planned.data}, "
        f"ZeRO {parallel.zero_stage}"
    )
    if parallel.sequence_parallel:
        text += ", sequence parallel"
    if parallel.recompute_every:
        text += f", recompute {recompute_text(parallel)}"
    return text


def as_json(
    planned: "Plan",
    fits: "Sequence[LayoutFit]",
    *,
    seconds: float,
    assumptions: Sequence[str],
) -> dict[str, Any]:
    """Everything printed, in bytes, FLOPs and seconds."""
    return {
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


def plan_json(planned: "Plan") -> dict[str, Any]:
    """A layout with its size and its heaviest rank's bytes."""
    return {
        "gpus": planned.gpus,
        **dataclasses.asdict(planned.parallel),
        "data": planned.data,
        "accumulation": planned.accumulation,
        "peak_bytes": planned.heaviest.peak,
        "sent_bytes": planned.sent_bytes,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "Predict parameters, memory, FLOPs and time of a run, and how few GPUs each legal layout "
        "of its model needs, without starting it.",
        "python tools/plan.py configs/runs/openwebtext_small.yaml --vocab-size 50257 --gpus 8",
    )
    parser.add_argument("config", type=given_path, help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="number of GPUs; default: the fewest that hold it"
    )
    parser.add_argument(
        "--gpu", choices=sorted(PEAK_FLOPS), default="h100", help="kind of GPU; default: h100"
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, metavar="GB", help="its memory, if other than --gpu has"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="T", help="its peak, if other than --gpu has"
    )
    parser.add_argument(
        "--usable",
        type=float,
        metavar="SHARE",
        default=0.9,
        help="share of that memory to fill; default: 0.9",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        default=0.4,
        help="share of the peak that is reached; default: 0.4",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens; default: the config's or the dataset's"
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="L",
        help="tokens in a block; default: the config's or the dataset's",
    )
    parser.add_argument(
        "--rows", type=int, metavar="K", default=20, help="layouts to show; 0: all; default: 20"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def main() -> int:
    return run_command(build_parser(), plan_command, intermixed=True)


if __name__ == "__main__":
    sys.exit(main())
