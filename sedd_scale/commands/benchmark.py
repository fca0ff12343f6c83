"""Measure training and sampling part by part, beside straightforward formulations."""

import argparse

from sedd_scale.benchmark import (
    checkpoint,
    communication,
    data,
    evaluation,
    gpu,
    loss,
    optimizer,
    rates,
    sample,
    step,
)
from sedd_scale.cli import Command, make_parser

SUBCOMMANDS = (
    loss,
    step,
    rates,
    optimizer,
    data,
    communication,
    sample,
    checkpoint,
    evaluation,
    gpu,
)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments, a subcommand a part."""
    parser = make_parser(
        "sedd-scale benchmark",
        "Measure one part of a training step: median time over repeats, tokens per second, memory.",
        "sedd-scale benchmark loss --baseline --json",
    )
    subparsers = parser.add_subparsers(required=True, title="parts")
    for subcommand in SUBCOMMANDS:
        subcommand.add_arguments(subparsers)
    return parser


COMMANDS = {"": Command(build_parser, lambda arguments: arguments.run(arguments))}
