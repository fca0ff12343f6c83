"""Train objectives, graphs and schedules on equal tokens and seeds, and report how they compare."""

import argparse

from sedd_scale.cli import Command, count, given_path, make_parser
from sedd_scale.errors import ConfigError


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale compare",
        "Train every variant of an experiment once for each seed, on the same tokens, evaluate all "
        "the same way and write report.md, report.png and report.json with the ratio to the "
        "baseline. "
        "Killed and started again, the same command resumes.",
        "sedd-scale compare configs/experiments/text8_style.yaml --data books.jsonl.xz "
        "--output runs/text8_style",
    )
    add = parser.add_argument
    add("config", type=given_path, help="YAML file of the experiment")
    add(
        "--data",
        type=given_path,
        required=True,
        metavar="PATH",
        help="a dataset of sedd-scale prepare_data, or text (a file, or a quoted pattern of files) "
        "that is prepared first",
    )
    add("--output", type=given_path, required=True, metavar="DIR", help="folder of runs and report")
    add("--seeds", type=int, nargs="+", metavar="I", help="seeds in place of the experiment's")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help="run and report only these variants, the baseline and what they start from",
    )
    add("--jobs", type=count, metavar="K", help="runs at a time (the experiment's)")
    return parser


def compare_command(arguments: argparse.Namespace) -> None:
    """Run what is missing of the experiment and write its report."""
    from dataclasses import replace

    from sedd_scale.experiments.experiment import check_seeds, load_experiment

    experiment = load_experiment(arguments.config)
    if arguments.seeds is not None:
        check_seeds(arguments.seeds, f"--seeds {' '.join(map(str, arguments.seeds))}")
        experiment = replace(experiment, seeds=arguments.seeds)
    if arguments.jobs is not None:
        experiment = replace(experiment, jobs=arguments.jobs)
    if arguments.only is not None:
        for name in arguments.only:
            if name not in experiment.variants:
                known = ", ".join(experiment.variants)
                raise ConfigError(f"--only {name} is none of the variants {known}")
        experiment = experiment.only(arguments.only)

    from sedd_scale.experiments.comparison import run_experiment
    from sedd_scale.experiments.report import write_report

    results = run_experiment(experiment, arguments.data, arguments.output)
    paths = write_report(experiment, results, arguments.output, command=arguments.command_line)
    print(paths[1].read_text(), end="")
    for path in paths:
        print(path)


COMMANDS = {"": Command(build_parser, compare_command)}
