"""Say what this machine and installation have and lack, and whether training works here."""

import argparse

from sedd_scale.cli import Command, make_parser


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale doctor",
        "Report Python, packages, GPUs, Slurm, disk and memory; add numbers up over two processes\n"
        "and train a small model for one step in a temporary folder; say what is missing and how\n"
        "to get it.",
        "sedd-scale doctor",
        exit_codes={
            0: "ready: what training needs is there and works",
            1: "not ready: the lines marked FAIL say what to mend",
        },
    )
    parser.add_argument("--quick", action="store_true", help="only look, run nothing")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


def doctor(arguments: argparse.Namespace) -> int:
    """Examine this machine and installation."""
    from sedd_scale.doctor.examination import doctor_command

    return doctor_command(arguments)


COMMANDS = {"": Command(build_parser, doctor)}
