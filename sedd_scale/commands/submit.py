"""Submit a training run to Slurm, with nodes, memory and time from its plan; show its state."""

import argparse
import json
import re
import sys
from pathlib import Path

from sedd_scale.cli import Command, count, given_path, make_parser, positive
from sedd_scale.errors import ConfigError
from sedd_scale.planning.arguments import add_plan_arguments
from sedd_scale.planning.flops import PEAK_FLOPS, run_seconds

GB = 1e9
# A core's float32 products, for trying things out without GPUs.
CPU_PEAK = 0.05e12


def submit_command(arguments: argparse.Namespace) -> None:
    """Plan, render and submit; with --dry-run, print the job file and write nothing."""
    from sedd_scale.cluster.job_size import job_size
    from sedd_scale.cluster.submission import (
        next_folder,
        refuse_second_job,
        render,
        snapshot,
        submit,
    )
    from sedd_scale.config import load_config
    from sedd_scale.planning.layouts import plan, smallest_fit
    from sedd_scale.planning.sizes import sizes_for_plan

    check_arguments(arguments)
    config = load_config(arguments.config, arguments.overrides)
    config.validate()
    vocab_size, block_length = sizes_for_plan(
        config, vocab_size=arguments.vocab_size, block_length=arguments.block_length
    )
    gpu = PEAK_FLOPS[arguments.gpu]
    usable = 0.9 * gpu["memory"]
    if arguments.gpus is not None:
        planned = plan(config, arguments.gpus, vocab_size=vocab_size, block_length=block_length)
    else:
        fit = smallest_fit(
            config, vocab_size=vocab_size, block_length=block_length, usable_bytes=usable
        )
        if fit.plan is None:
            raise ConfigError(
                f"the layout fits no number of {arguments.gpu}s, a rank needs "
                f"{fit.least_bytes / GB:.0f} GB: sedd-scale plan shows layouts that fit"
            )
        planned = fit.plan
    if not arguments.cpu and planned.heaviest.peak > usable:
        raise ConfigError(
            f"--gpus {planned.gpus}: a rank needs {planned.heaviest.peak / GB:.0f} GB, of "
            f"{usable / GB:.0f} GB usable: give more GPUs, or a layout of sedd-scale plan"
        )
    peak = CPU_PEAK if arguments.cpu else gpu[config.training.precision]
    seconds = run_seconds(
        planned.flops,
        steps=config.training.steps,
        gpus=planned.gpus,
        peak=peak,
        mfu=arguments.mfu,
    )
    size = job_size(
        planned,
        tasks_per_node=arguments.gpus_per_node,
        run_seconds=seconds,
        longest_seconds=3600 * arguments.longest,
        on_cpu=arguments.cpu,
    )
    run_dir = arguments.run_dir.resolve()
    folder = next_folder(run_dir)
    text = render(
        folder,
        run_dir,
        size,
        name=re.sub(r"[^\w.-]", "-", run_dir.name),
        python=sys.executable,
        cpus_per_task=arguments.cpus_per_task,
        on_cpu=arguments.cpu,
        launcher=arguments.launcher,
        directives=arguments.sbatch,
        working_directory=Path.cwd(),
    )
    if arguments.dry_run:
        print(text, end="")
        return
    refuse_second_job(run_dir)
    snapshot(folder, config)
    (run_dir / "slurm").mkdir(exist_ok=True)  # of the job's log
    job_file = folder / "job.sbatch"
    job_file.write_text(text)
    job = submit(job_file)
    print(
        f"job {job}: {size.tasks} processes on {size.nodes} nodes, {size.memory_gb} GB per node, "
        f"about {size.run_seconds / 3600:.1f} hours in {size.starts} start"
        f"{'s' * (size.starts > 1)}; log {run_dir}/slurm/{job}.log"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if arguments.cpu and arguments.gpus is None:
        raise ConfigError("--cpu: how many processes? Give --gpus N as well")
    for flag in arguments.sbatch:
        if not flag.startswith("-") or "\n" in flag:
            raise ConfigError(f"--sbatch {flag!r} is not a flag: write --sbatch=--account=NAME")


def status_command(arguments: argparse.Namespace) -> None:
    """Print the state of a run."""
    from sedd_scale.checkpoint.directory import run_of
    from sedd_scale.cluster.run_status import format_status, run_status

    status = run_status(run_of(arguments.run_dir))
    print(json.dumps(status) if arguments.json else format_status(status))


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale submit",
        "Submit a training run to Slurm: nodes and tasks from its layout, memory and time from its "
        "plan. `sedd-scale submit status RUN_DIR` shows its state.",
        "sedd-scale submit configs/runs/openwebtext_xl.yaml --run-dir runs/xl --gpus 32 "
        "--vocab-size 50257 --sbatch=--account=NAME --dry-run",
    )
    add_plan_arguments(parser)
    add = parser.add_argument
    add(
        "--run-dir",
        type=given_path,
        required=True,
        help="run directory, on storage that all nodes share",
    )
    add(
        "--gpus-per-node",
        type=count,
        default=8,
        metavar="N",
        help="GPUs per node of the cluster (%(default)s)",
    )
    add(
        "--cpus-per-task",
        type=count,
        default=8,
        metavar="N",
        help="CPU cores per process (%(default)s)",
    )
    add("--cpu", action="store_true", help="processes without GPUs, to try things out")
    add(
        "--longest",
        type=positive,
        default=24.0,
        metavar="HOURS",
        help="time limit of a start; a longer run requeues itself (%(default)s)",
    )
    add(
        "--launcher",
        choices=("srun", "torchrun"),
        default="srun",
        help="program that starts the processes (%(default)s)",
    )
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more flag of sbatch, as --sbatch=--partition=NAME; repeat for several",
    )
    add("--dry-run", action="store_true", help="print the job file; write and submit nothing")
    return parser


def build_status_parser() -> argparse.ArgumentParser:
    """The arguments of `status`."""
    parser = make_parser(
        "sedd-scale submit status",
        "Show a run's job, progress, restarts, last metrics and time left.",
        "sedd-scale submit status runs/xl",
    )
    parser.add_argument("run_dir", type=given_path, metavar="RUN_DIR")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    return parser


COMMANDS = {
    "": Command(build_parser, submit_command, intermixed=True),
    "status": Command(build_status_parser, status_command),
}
