"""Train a score-entropy model under any layout, and go on after an interruption."""

import argparse

from sedd_scale.cli import Command, given_path, make_parser, outlive_stdout
from sedd_scale.training.signals import (
    EXIT_LOST_RANK,
    EXIT_STOPPED,
    StopSignals,
    exit_code_after_stop,
)


def train_command(arguments: argparse.Namespace) -> int:
    """Read and check the configuration, then train; 75 or 0 after a stop at a signal."""
    stop = StopSignals()
    stop.install()

    from sedd_scale.config import load_config

    config = load_config(arguments.config, arguments.overrides)

    from sedd_scale.parallel.layout import shutdown
    from sedd_scale.training.loop import train
    from sedd_scale.training.lost_ranks import lost_ranks_in_one_line

    with lost_ranks_in_one_line(lambda: "before the first step or after the last"):
        if arguments.replay is not None:
            from sedd_scale.training.replay import replay

            for line in replay(config, arguments.run_dir, arguments.replay):
                print(line, flush=True)
            shutdown()
            return 0
        outlive_stdout("standard output takes no more; training goes on, see metrics.jsonl")
        finished = train(config, arguments.run_dir, stop)
        stop.disarm()
        shutdown()
    return 0 if finished else exit_code_after_stop()


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale train",
        "Train a score-entropy model on a prepared dataset, under any layout; started again with "
        "the same --run-dir it goes on from its last checkpoint.",
        "torchrun --nproc-per-node 2 -m sedd_scale train configs/runs/tiny.yaml "
        "--run-dir runs/first data.path=data/books parallel.tensor=2",
        exit_codes={
            0: "done; under torchrun with restarts left also stopped by a signal",
            EXIT_STOPPED: "stopped by a signal, saved; the same command resumes",
            EXIT_LOST_RANK: "another rank hangs or was lost; the same command resumes",
        },
    )
    parser.add_argument("config", type=given_path, help="YAML file of the run")
    parser.add_argument(
        "--run-dir", type=given_path, required=True, help="where metrics and checkpoints go"
    )
    parser.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="run a step of bad_steps.jsonl again, from the last checkpoint before it, and say "
        "what is wrong with it; nothing is written",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )
    return parser


COMMANDS = {"": Command(build_parser, train_command, intermixed=True)}
