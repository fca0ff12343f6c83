"""From the text every Python carries to a trained, evaluated and sampled model, in minutes."""

import argparse
from pathlib import Path

from sedd_scale.cli import Command, at_least, given_path, make_parser

STEPS = 1000


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale quickstart",
        "Prepare data, train on two processes, resume under another layout, evaluate, sample and "
        "plot, printing every command before it runs.",
        "sedd-scale quickstart --output quickstart",
    )
    add = parser.add_argument
    add(
        "--output",
        type=given_path,
        default=Path("quickstart"),
        metavar="DIR",
        help="folder for everything; an earlier quickstart in it is replaced (%(default)s)",
    )
    add(
        "--training-steps",
        type=at_least(2),
        default=STEPS,
        metavar="K",
        help="training steps (%(default)s)",
    )
    return parser


def quickstart_command(arguments: argparse.Namespace) -> None:
    """Run the tour and sum it up."""
    from sedd_scale.experiments.quickstart import take_tour

    take_tour(arguments.output, steps=arguments.training_steps)


COMMANDS = {"": Command(build_parser, quickstart_command)}
