"""Look at samples that sedd-scale generate wrote: a report, or how one of them came about."""

import argparse
import sys
from pathlib import Path

from sedd_scale.cli import (
    Command,
    given_path,
    make_parser,
    need_stdout,
    positive,
    print_result,
)
from sedd_scale.errors import ConfigError, DataError

STEPS_PER_SECOND = 8.0


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale samples",
        "Look at samples that sedd-scale generate wrote: a report on all of them, or the "
        "trajectory of a traced one, in the terminal or as an HTML page.",
        "sedd-scale samples samples.jsonl --judge gpt2-large",
    )
    add = parser.add_argument
    add("samples", type=given_path, metavar="FILE.jsonl", help="what sedd-scale generate wrote")
    add(
        "--judge",
        metavar="PATH_OR_NAME",
        help="causal language model that gives the samples a generative perplexity: a Hugging Face "
        "model directory, a .gguf file or a name on the hub (gpt2-large in most papers)",
    )
    add(
        "--device",
        metavar="NAME",
        help="where the judge runs, such as cpu or cuda:1 (the first GPU, if any)",
    )
    add("--report", type=given_path, metavar="FILE.json", help="also write the report as JSON")
    add(
        "--track",
        type=given_path,
        metavar="RUN_DIR",
        help="also send the samples, as a table, to the trackers of their run (logging.wandb and "
        "logging.tensorboard)",
    )
    show = parser.add_mutually_exclusive_group()
    show.add_argument(
        "--show-trace",
        action="store_true",
        help="instead of the report play a sample's trajectory; a few frames where the output is "
        "not a terminal",
    )
    show.add_argument(
        "--trace",
        type=given_path,
        metavar="FILE.html",
        help="instead of the report write the page of all traced samples",
    )
    add("--id", metavar="ID", help="id of the sample to play (the first traced one)")
    add(
        "--steps-per-second",
        type=positive,
        metavar="R",
        help=f"speed of the trajectory ({STEPS_PER_SECOND:g})",
    )
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse combinations that would leave an option without effect."""
    reports = not arguments.show_trace and arguments.trace is None
    if not reports:
        for name in ("judge", "report", "track"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} goes with the report: leave out the trace")
    if arguments.device is not None and arguments.judge is None:
        raise ConfigError("--device goes with --judge: give one or leave it out")
    for name in ("id", "steps_per_second"):
        if getattr(arguments, name) is not None and not arguments.show_trace:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} goes with --show-trace: give it or leave it out")


def samples_command(arguments: argparse.Namespace) -> None:
    """Report on the samples, or show a trace."""
    check_arguments(arguments)
    if arguments.show_trace:
        show_trace(arguments)
    elif arguments.trace is not None:
        write_page(arguments)
    else:
        report(arguments)


def show_trace(arguments: argparse.Namespace) -> None:
    """Play one sample's trajectory on standard output."""
    from sedd_scale.generation.samples_file import read_samples
    from sedd_scale.generation.trace_terminal import play

    for record in read_samples(arguments.samples):
        wanted = "trace" in record if arguments.id is None else str(record["id"]) == arguments.id
        if wanted:
            rate = arguments.steps_per_second or STEPS_PER_SECOND
            play(record, sys.stdout, steps_per_second=rate)
            return
    missing = "traced sample" if arguments.id is None else f"sample with the id {arguments.id}"
    raise DataError(f"{arguments.samples} holds no {missing}: generate with --trace")


def write_page(arguments: argparse.Namespace) -> None:
    """Write the page of all traced samples."""
    from sedd_scale.files.atomic import refuse_existing_output
    from sedd_scale.generation.samples_file import traced_samples
    from sedd_scale.generation.trace_page import write_trace_page

    refuse_existing_output(arguments.trace, "--trace ")
    write_trace_page(arguments.trace, traced_samples(arguments.samples))
    print(arguments.trace)


def report(arguments: argparse.Namespace) -> None:
    """Print the report, and write it where asked."""
    from sedd_scale.files.atomic import refuse_existing_output
    from sedd_scale.generation.quality import format_quality
    from sedd_scale.generation.samples_file import judge_file, quality_of_file, write_report

    if arguments.report is None:
        need_stdout("--report FILE.json")
    else:
        refuse_existing_output(arguments.report, "--report ")
    if arguments.judge is not None:
        from sedd_scale.generation.judge import check_judge

        check_judge(arguments.judge)
    found = {"output": str(arguments.samples), **quality_of_file(arguments.samples)}
    if arguments.judge is not None:
        import torch

        name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(f"--device {name} is unknown: give cpu, cuda or cuda:1") from error
        found["generative_perplexity"] = judge_file(arguments.samples, arguments.judge, device)
    try:
        if arguments.report is not None:
            write_report(arguments.report, found)
        if arguments.track is not None:
            send_to_trackers(arguments.samples, arguments.track)
    finally:
        print_result(format_quality(found))


def send_to_trackers(samples: Path, run_dir: Path) -> None:
    """Send samples to the trackers of a run, at the step of its last checkpoint."""
    from sedd_scale.checkpoint.directory import read_meta, run_of
    from sedd_scale.config import load_config
    from sedd_scale.generation.samples_file import read_samples
    from sedd_scale.tracking.trackers import open_trackers

    step = int(read_meta(run_dir)["step"])
    run_dir = run_of(run_dir)
    config = load_config(run_dir / "config.yaml")
    trackers = open_trackers(
        run_dir, config.logging, config.to_dict(), resumed_step=config.training.steps
    )
    if not trackers:
        raise ConfigError(
            f"--track {run_dir}: the run has no tracker: train it with logging.wandb or "
            "logging.tensorboard=true"
        )
    rows = [
        {"id": str(record.get("id")), "text": record.get("text") or str(record.get("tokens"))}
        for record in read_samples(samples)
    ]
    for tracker in trackers:
        tracker.log_samples(step, rows)
    for tracker in trackers:
        tracker.close()


COMMANDS = {"": Command(build_parser, samples_command)}
