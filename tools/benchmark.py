"""Measure training and sampling part by part, beside straightforward formulations."""

import argparse
import sys

from sedd_scale.benchmark import (
    checkpoint,
    communication,
    data,
    evaluation,
    loss,
    optimizer,
    sample,
    step,
)
from sedd_scale.cli import make_parser, run_command

SUBCOMMANDS = (loss, step, optimizer, data, communication, sample, checkpoint, evaluation)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments, a subcommand a part."""
    parser = make_parser(
        "Measure one part of a training step: median time over repeats, tokens a second, memory.",
        "python tools/benchmark.py loss --baseline --json",
    )
    subparsers = parser.add_subparsers(required=True, title="parts")
    for subcommand in SUBCOMMANDS:
        subcommand.add_arguments(subparsers)
    return parser


def main() -> int:
    return run_command(build_parser(), lambda arguments: arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
