"""python -m sedd_scale: look at this installation, and let a shell or lm_eval know of it."""

import argparse
import sys
from collections.abc import Sequence

from sedd_scale.cli import add_command, make_parser, run_command

PROG = "python -m sedd_scale"


def doctor(arguments: argparse.Namespace) -> int:
    """Examine this machine and installation."""
    from sedd_scale.doctor.examination import doctor_command

    return doctor_command(arguments)


def completion(arguments: argparse.Namespace) -> None:
    """Print the script that lets a shell complete all commands."""
    from sedd_scale.completion import all_parsers, bash_script

    print(bash_script({**all_parsers(), "sedd_scale": build_parser()}), end="")


def lm_eval(arguments: argparse.Namespace) -> None:
    """Let lm_eval find the model, or not."""
    from sedd_scale.evaluation.harness_hook import switch

    print(switch(arguments.state == "on"))


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments, a subcommand each."""
    parser = make_parser(
        "Look at this installation. Training, sampling and evaluation are in tools/.",
        f"{PROG} doctor",
        exit_codes={1: "doctor: training does not work here; else a fault of this program"},
        prog=PROG,
    )
    subparsers = parser.add_subparsers(required=True, title="commands")
    command = add_command(
        subparsers,
        "doctor",
        help="report what is installed and whether training works here",
        description="Report Python, packages, GPUs, Slurm, disk and memory; add numbers up over "
        "two processes and\ntrain a small model for one step in a temporary folder; say what is "
        "missing and how to get it.",
        example=f"{PROG} doctor",
        exit_codes={
            0: "ready: what training needs is there and works",
            1: "not ready: the lines marked FAIL say what to mend",
        },
    )
    command.add_argument("--quick", action="store_true", help="only look, run nothing")
    command.add_argument("--json", action="store_true", help="end with one JSON object")
    command.set_defaults(run=doctor)
    command = add_command(
        subparsers,
        "completion",
        help="print a script that lets a shell complete options, values and keys",
        example=f"source <({PROG} completion bash)",
    )
    command.add_argument("shell", choices=("bash",), help="the shell it is for")
    command.set_defaults(run=completion)
    command = add_command(
        subparsers,
        "lm-eval",
        help="let lm_eval --model sedd_scale work in this environment, or not",
        description="Write a line into this environment's site-packages that tells the package "
        "lm_eval of the model\nsedd_scale whenever Python starts there, or remove it.",
        example=f"{PROG} lm-eval on",
    )
    command.add_argument("state", choices=("on", "off"))
    command.set_defaults(run=lm_eval)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(build_parser(), lambda arguments: arguments.run(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
