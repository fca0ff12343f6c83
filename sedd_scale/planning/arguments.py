"""The flags by which commands name a run that is to be planned."""

import argparse

from sedd_scale.cli import count, given_path, positive
from sedd_scale.planning.flops import PEAK_FLOPS


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration, its overrides, --gpus, --gpu, --mfu, --vocab-size, --block-length."""
    add = parser.add_argument
    add("config", type=given_path, help="YAML file of the run")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    add("--gpus", type=count, metavar="N", help="number of GPUs (the fewest that hold the run)")
    add("--gpu", choices=sorted(PEAK_FLOPS), default="h100", help="kind of GPU (%(default)s)")
    add(
        "--mfu",
        type=positive,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that is reached (%(default)s)",
    )
    sizes = (("--vocab-size", "N", "tokens"), ("--block-length", "L", "tokens per block"))
    for flag, metavar, meaning in sizes:
        known = f"{meaning} (the configuration's or the dataset's)"
        add(flag, type=count, metavar=metavar, help=known)
