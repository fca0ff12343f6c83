"""Draw the curves of one or several runs."""

import argparse
import sys
from pathlib import Path

from sedd_scale.cli import make_parser, run_command
from sedd_scale.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "Draw the loss, the validation bound with its standard error, the gradient norm, the "
        "learning rate and the throughput of runs from their metrics.jsonl.",
        "python tools/plot_run.py runs/first runs/second --output both.png",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run directories, drawn together")
    add(
        "--output",
        type=Path,
        metavar="FILE.png",
        help="the picture, replaced where it exists (one run: RUN/curves.png)",
    )
    return parser


def plot_command(arguments: argparse.Namespace) -> None:
    """Read the runs, draw them and print where."""
    from sedd_scale.training.plots import plot_runs, read_run

    output = arguments.output
    if output is None:
        if len(arguments.runs) > 1:
            raise ConfigError(f"{len(arguments.runs)} runs have no one place: give --output")
        output = arguments.runs[0] / "curves.png"
    runs = [read_run(path, name=str(path)) for path in arguments.runs]
    plot_runs(runs, output)
    print(output)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), plot_command))
