"""Predict what a run needs before it starts: parameters, memory, FLOPs, time and layouts."""

import argparse
import json

from sedd_scale.cli import Command, at_least, given_path, make_parser, positive
from sedd_scale.planning.arguments import add_plan_arguments
from sedd_scale.planning.flops import PEAK_FLOPS, run_seconds

GB = 1e9


def plan_command(arguments: argparse.Namespace) -> None:
    """Plan the run on the GPUs given, or on the fewest, and every other legal layout."""
    from sedd_scale.config import load_config
    from sedd_scale.planning.layouts import ASSUMPTIONS, fit_layouts, plan, smallest_fit
    from sedd_scale.planning.sizes import sizes_for_plan
    from sedd_scale.planning.step_time import DEVICES, read_rates, step_time
    from sedd_scale.planning.table import as_json, print_layouts, print_plan, print_step_time

    config = load_config(arguments.config, arguments.overrides)
    gpu = PEAK_FLOPS[arguments.gpu]
    memory = gpu["memory"] if arguments.gpu_memory_gb is None else GB * arguments.gpu_memory_gb
    peak = gpu[config.training.precision]
    if arguments.peak_tflops is not None:
        peak = 1e12 * arguments.peak_tflops
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
        most *= config.parallel.model_size
        planned = fit.plan or plan(config, most, **sizes)
    fits = fit_layouts(config, **sizes, usable_bytes=usable)
    seconds = run_seconds(
        planned.flops,
        steps=config.training.steps,
        gpus=planned.gpus,
        peak=peak,
        mfu=arguments.mfu,
    )
    predicted, device = None, DEVICES.get(arguments.gpu)
    if arguments.measured is not None:
        device = read_rates(arguments.measured)
    elif config.training.precision != "bf16":
        device = None  # the named devices' rates are those of bf16
    if device is not None:
        predicted = step_time(config, planned, **sizes, device=device, peak=peak)
    assumptions = (
        *ASSUMPTIONS,
        f"{arguments.usable:.0%} of {memory / GB:g} GB per GPU usable, the rest for CUDA, NCCL and "
        "fragments",
        f"{arguments.mfu:.0%} of {peak / 1e12:g} TFLOP/s per GPU reached",
    )
    print_plan(config, planned, usable=usable, seconds=seconds)
    if predicted is not None:
        print_step_time(predicted, str(arguments.measured or f"{arguments.gpu}s"))
    print_layouts(fits, arguments.rows)
    print("\nassumptions: " + ";\n  ".join(assumptions))
    if arguments.json:
        print(
            json.dumps(
                as_json(
                    planned,
                    fits,
                    seconds=seconds,
                    predicted=predicted,
                    assumptions=assumptions,
                )
            )
        )


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale plan",
        "Predict parameters, memory, FLOPs and time of a run, and how few GPUs each legal layout "
        "of its model needs, without starting it.",
        "sedd-scale plan configs/runs/openwebtext_small.yaml --vocab-size 50257 --gpus 8",
    )
    add_plan_arguments(parser)
    add = parser.add_argument
    add("--gpu-memory-gb", type=positive, metavar="GB", help="its memory, if other than --gpu has")
    add(
        "--measured",
        type=given_path,
        metavar="FILE",
        help="what a device reaches, from `benchmark rates --output`: predict the step from it",
    )
    add("--peak-tflops", type=positive, metavar="T", help="its peak, if other than --gpu has")
    add(
        "--usable",
        type=positive,
        metavar="SHARE",
        default=0.9,
        help="share of the memory to fill (%(default)s)",
    )
    add("--rows", type=at_least(0), metavar="K", default=20, help="layouts to show, 0: all (20)")
    add("--json", action="store_true", help="end with one JSON object")
    return parser


COMMANDS = {"": Command(build_parser, plan_command, intermixed=True)}
