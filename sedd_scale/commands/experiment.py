"""Measure what a score-entropy model learns where the truth is known, and how it scales."""

import argparse
import itertools
import sys

from sedd_scale.cli import Command, count, given_path, make_parser
from sedd_scale.errors import ConfigError
from sedd_scale.experiments import DAMAGE, GRAPHS, SCHEDULES


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments: none without a subcommand."""
    return make_parser(
        "sedd-scale experiment",
        "Measure how well scores cover a known source (`experiment coverage`), how robust they\n"
        "are to damaged text (`experiment robustness`), how bounds fall with compute\n"
        "(`experiment scaling`), and what bfloat16 costs them (`experiment rounding`).",
        "sedd-scale experiment coverage --output runs/coverage",
    )


def experiment_command(arguments: argparse.Namespace) -> None:
    """Say which experiments there are."""
    raise ConfigError("which experiment? Give coverage, robustness, scaling or rounding")


def build_coverage_parser() -> argparse.ArgumentParser:
    """The arguments of `coverage`."""
    parser = make_parser(
        "sedd-scale experiment coverage",
        "Train a small model under each graph and schedule on a source whose ratios are known, and "
        "compare its scores with them: report.md, report.json and report.png.",
        "sedd-scale experiment coverage --output runs/support_coverage",
    )
    add = parser.add_argument
    add("--output", type=given_path, required=True, metavar="DIR", help="folder of the report")
    add("--steps", type=count, default=2000, metavar="K", help="training steps (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="I", help="seeds of each model (0)")
    add("--graphs", nargs="+", choices=GRAPHS, default=GRAPHS)
    add("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    return parser


def coverage_command(arguments: argparse.Namespace) -> None:
    """Train, compare and report."""
    from sedd_scale.experiments.support_coverage import measure, write_coverage

    rows = []
    for choice in itertools.product(arguments.graphs, arguments.schedules, arguments.seeds):
        graph, schedule, seed = choice
        rows.append(measure(graph, schedule, steps=arguments.steps, seed=seed))
        print(f"{graph}, {schedule}, seed {seed}: {rows[-1]}", file=sys.stderr, flush=True)
    write_coverage(rows, arguments.output, steps=arguments.steps, command=arguments.command_line)
    print((arguments.output / "report.md").read_text(), end="")


def build_robustness_parser() -> argparse.ArgumentParser:
    """The arguments of `robustness`."""
    parser = make_parser(
        "sedd-scale experiment robustness",
        "Train a small model on sequences with planted noise or missing tokens and compare its "
        "scores with the source's: report.md, report.json and report.png.",
        "sedd-scale experiment robustness --output runs/robustness",
    )
    add = parser.add_argument
    add("--output", type=given_path, required=True, metavar="DIR", help="folder of the report")
    add("--steps", type=count, default=1000, metavar="K", help="training steps (%(default)s)")
    add(
        "--rates",
        type=float,
        nargs="+",
        default=[0.0, 0.05, 0.2],
        help="rates of damage (0 0.05 0.2)",
    )
    add("--graphs", nargs="+", choices=GRAPHS, default=GRAPHS)
    add("--seed", type=int, default=0, metavar="I", help="seed of weights and data (%(default)s)")
    return parser


def robustness_command(arguments: argparse.Namespace) -> None:
    """Train, compare and report."""
    from sedd_scale.experiments.known_source import damaged
    from sedd_scale.experiments.support_coverage import measure, write_robustness

    for rate in arguments.rates:
        if not 0.0 <= rate < 1.0:
            raise ConfigError(f"--rates {rate} is not a rate: give numbers from 0 on, below 1")
    rows = []
    for graph in arguments.graphs:
        for kind in DAMAGE:
            for rate in arguments.rates:
                found = measure(
                    graph,
                    "loglinear",
                    steps=arguments.steps,
                    seed=arguments.seed,
                    draw=damaged(kind, rate),
                )
                rows.append({**found, "damage": kind, "rate": rate})
                print(f"{graph}, {kind} {rate}: {rows[-1]}", file=sys.stderr, flush=True)
    write_robustness(rows, arguments.output, steps=arguments.steps, command=arguments.command_line)
    print((arguments.output / "report.md").read_text(), end="")


def build_scaling_parser() -> argparse.ArgumentParser:
    """The arguments of `scaling`."""
    parser = make_parser(
        "sedd-scale experiment scaling",
        "Train several sizes of score entropy and autoregressive models with equal FLOPs and fit a "
        "power law to each: report.md, report.json and report.png.",
        "sedd-scale experiment scaling --data books.jsonl.xz --output runs/scaling",
    )
    add = parser.add_argument
    add(
        "--data",
        type=given_path,
        required=True,
        metavar="PATH",
        help="text, or a dataset of 27 symbols",
    )
    add("--output", type=given_path, required=True, metavar="DIR", help="folder of runs and report")
    add(
        "--widths",
        type=int,
        nargs="+",
        default=[64, 96, 128],
        metavar="H",
        help="hidden sizes (64 96 128)",
    )
    add(
        "--steps",
        type=count,
        default=800,
        metavar="K",
        help="training steps of the largest size (%(default)s)",
    )
    add("--seeds", type=int, nargs="+", default=[0], metavar="I", help="seeds of each model (0)")
    add(
        "--block-length",
        type=count,
        default=128,
        metavar="L",
        help="tokens per block (%(default)s)",
    )
    add("--jobs", type=count, default=2, metavar="K", help="runs at a time (%(default)s)")
    return parser


def scaling_command(arguments: argparse.Namespace) -> None:
    """Run what is missing, fit and report."""
    from sedd_scale.experiments.comparison import run_experiment
    from sedd_scale.experiments.experiment import (
        DataSettings,
        EvaluationSettings,
        Experiment,
        check_seeds,
    )
    from sedd_scale.experiments.scaling import summarise, variants_of, write_report

    check_seeds(arguments.seeds, f"--seeds {' '.join(map(str, arguments.seeds))}")
    if len(set(arguments.widths)) < 3:
        raise ConfigError(f"--widths {arguments.widths}: give at least three different ones")
    variants = variants_of(arguments)
    experiment = Experiment(
        title="Scaling at equal compute",
        variants=variants,
        changes={name: [] for name in variants},
        baseline=next(iter(variants)),
        seeds=arguments.seeds,
        data=DataSettings(block_length=arguments.block_length),
        evaluation=EvaluationSettings(),
        jobs=arguments.jobs,
        threads=1,
    )
    results = run_experiment(experiment, arguments.data, arguments.output)
    write_report(summarise(results), arguments.output, arguments.command_line)
    print((arguments.output / "report.md").read_text(), end="")


def build_rounding_parser() -> argparse.ArgumentParser:
    """The arguments of `rounding`."""
    parser = make_parser(
        "sedd-scale experiment rounding",
        "Evaluate a trained model in float32 and bfloat16, with logits of either, on the same "
        "draws: report.md, report.json and report.png.",
        "sedd-scale experiment rounding --checkpoint RUN --data valid.txt --output runs/rounding",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, or anything eval_ppl takes")
    add(
        "--data",
        type=given_path,
        required=True,
        metavar="PATH",
        help="text, or a dataset with a validation split",
    )
    add("--output", type=given_path, required=True, metavar="DIR", help="folder of the report")
    add("--draws", type=count, default=16, metavar="K", help="times drawn a block (%(default)s)")
    add("--max-blocks", type=count, default=64, metavar="K", help="most blocks (%(default)s)")
    add("--seed", type=int, default=0, metavar="I", help="seed of the draws (%(default)s)")
    return parser


def rounding_command(arguments: argparse.Namespace) -> None:
    """Evaluate, compare and report."""
    from sedd_scale.experiments.rounding import measure, write_rounding

    if arguments.max_blocks < 2:
        raise ConfigError("--max-blocks 1: give at least 2, for an error of the difference")
    rows = measure(
        arguments.checkpoint,
        arguments.data,
        draws=arguments.draws,
        max_blocks=arguments.max_blocks,
        seed=arguments.seed,
    )
    write_rounding(rows, arguments.output, arguments.command_line)
    print((arguments.output / "report.md").read_text(), end="")


COMMANDS = {
    "": Command(build_parser, experiment_command),
    "coverage": Command(build_coverage_parser, coverage_command),
    "robustness": Command(build_robustness_parser, robustness_command),
    "scaling": Command(build_scaling_parser, scaling_command),
    "rounding": Command(build_rounding_parser, rounding_command),
}
