"""Bytes sent per rank and step under each layout, beside the fewest that the layout can do with.

Without a launcher it starts the processes of each layout itself, on this machine.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any

from sedd_scale.benchmark.arguments import add_shape_arguments
from sedd_scale.benchmark.report import environment
from sedd_scale.cli import add_command
from sedd_scale.errors import ConfigError, SeddScaleError
from sedd_scale.files.package import environment_for

# name: processes, overrides
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP2": (2, ("parallel.tensor=2",)),
    "TP2 SP": (2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "PP2": (2, ("parallel.pipeline=2",)),
    "TP2 Muon": (2, ("parallel.tensor=2", "optimizer.name=muon")),
    "DP2 ZeRO 3 Muon": (2, ("parallel.zero_stage=3", "optimizer.name=muon")),
    "DP2 ZeRO 1": (2, ()),
    "DP2 ZeRO 1 bf16": (2, ("training.precision=bf16",)),
    "DP2 ZeRO 2": (2, ("parallel.zero_stage=2",)),
    "DP2 ZeRO 3": (2, ("parallel.zero_stage=3",)),
    "PP2 DP2 ZeRO 1": (4, ("parallel.pipeline=2",)),
    "TP2 PP2 SP": (
        4,
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true"),
    ),
    "TP2 DP2 ZeRO 2": (4, ("parallel.tensor=2", "parallel.zero_stage=2")),
    "TP2 DP2 ZeRO 3": (4, ("parallel.tensor=2", "parallel.zero_stage=3")),
}
ALLOWED = 1.05


def add_arguments(subparsers: Any) -> None:
    """Register `communication` and its options."""
    parser = add_command(
        subparsers,
        "communication",
        help="bytes sent per rank and step, by layout",
        example="sedd-scale benchmark communication --layout TP2 --json",
    )
    parser.add_argument(
        "--layout",
        action="append",
        choices=LAYOUTS,
        dest="layouts",
        help="one of the table; repeat for several (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    add_shape_arguments(parser, model="tiny", accumulate=4, length=128, vocab=512)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure the layouts and report; in a process of a launch, measure those of its size."""
    names = arguments.layouts or list(LAYOUTS)
    if "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
        if any(LAYOUTS[name][0] != world_size for name in names):
            raise ConfigError(f"--layout {', '.join(names)}: not all are of {world_size} processes")
        measured = measure_here(arguments, names)
    else:
        measured = []
        for size in sorted({LAYOUTS[name][0] for name in names}):
            of_size = [name for name in names if LAYOUTS[name][0] == size]
            measured += launch(arguments, size, of_size)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    print_table(measured)
    if arguments.json:
        result = {
            "part": "communication",
            "model": arguments.model,
            "batch": arguments.batch_size,
            "accumulate": arguments.accumulate,
            "length": arguments.block_length,
            "vocab": arguments.vocab_size,
            "layouts": measured,
            "allowed_ratio": ALLOWED,
            "all_within": all(line["within"] for line in measured),
            **environment(),
        }
        print(json.dumps(result))


def launch(
    arguments: argparse.Namespace, num_processes: int, names: list[str]
) -> list[dict[str, Any]]:
    """Measure layouts of one size in processes of their own."""
    words = [part for name in names for part in ("--layout", name)]
    for name in ("model", "batch_size", "accumulate", "block_length", "vocab_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_processes)),
            *(
                "-m",
                "sedd_scale",
                "benchmark",
                "communication",
                "--json",
                *words,
                *arguments.overrides,
            ),
        ],
        env=environment_for({"OMP_NUM_THREADS": "1", **os.environ}),
        capture_output=True,
        text=True,
    )
    if finished.returncode != 0:
        raise LaunchError(f"{num_processes} processes for {names}: {finished.stderr[-2000:]}")
    layouts: list[dict[str, Any]] = json.loads(finished.stdout.splitlines()[-1])["layouts"]
    return layouts


class LaunchError(SeddScaleError):
    """Processes that were started to be measured failed."""


def measure_here(arguments: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Run two steps under each layout, the second one counted; every process calls this."""
    from sedd_scale.parallel.layout import leave_layout, shutdown

    measured = []
    for name in names:
        measured.append(measure_layout(arguments, name))
        leave_layout()
    shutdown()
    return measured


def measure_layout(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One line of the report, from all processes."""
    import torch.distributed as dist

    from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config
    from sedd_scale.benchmark.traffic import required_traffic, traffic_of
    from sedd_scale.parallel.layout import initialize_layout

    processes, overrides = LAYOUTS[name]
    config = synthetic_config(
        arguments, "training.precision=fp32", *overrides, world_size=processes
    )
    layout = initialize_layout(
        **config.parallel.axes, sequence_parallel=config.parallel.sequence_parallel
    )
    synthetic = SyntheticRun(config, layout)
    engine = synthetic.engine()
    synthetic.train_step(engine, 0)
    sent = traffic_of(lambda: synthetic.train_step(engine, 1), layout)
    required = required_traffic(
        config,
        layout,
        parameters={one.name: math.prod(one.local_shape) for one in engine.parameters},
        rows=sum(len(batch.targets.rows_M) for batch in synthetic.micro_batches(1)),
    )
    of_ranks: list[Any] = [None] * layout.world_size
    dist.all_gather_object(of_ranks, (dict(sent), required))
    total: Counter[tuple[str, str]] = Counter()
    fewest: Counter[str] = Counter()
    for sent_there, required_there in of_ranks:
        total.update(sent_there)
        fewest.update(required_there)
    bytes_sent = sum(total.values()) / processes
    minimum = sum(fewest.values()) / processes
    return {
        "layout": name,
        "processes": processes,
        "bytes_sent": bytes_sent,
        "minimum_bytes": minimum,
        "ratio": bytes_sent / minimum,
        "within": bytes_sent <= ALLOWED * minimum,
        "by_collective": {
            f"{collective} ({group})": value / processes
            for (collective, group), value in sorted(total.items())
        },
        "minimum_by_group": {group: value / processes for group, value in fewest.items() if value},
    }


def print_table(measured: list[dict[str, Any]]) -> None:
    """Kilobytes per rank and step, a layout a line, then what they are made of."""
    print(f"{'layout':<18}{'sent kB':>12}{'minimum kB':>12}{'ratio':>8}  sent as")
    for line in measured:
        parts = ", ".join(
            f"{name} {value / 1e3:.1f}"
            for name, value in sorted(line["by_collective"].items(), key=lambda item: -item[1])
            if value >= 1e-3 * line["bytes_sent"]
        )
        print(
            f"{line['layout']:<18}{line['bytes_sent'] / 1e3:>12.1f}"
            f"{line['minimum_bytes'] / 1e3:>12.1f}{line['ratio']:>8.3f}  {parts}"
        )
