"""The whole training step, beside the textbook step on the same batches.

Both sides start from tokens on the host and end with updated weights and averages: corrupt,
forward, loss, backward, clip, AdamW and its moving average.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sedd_scale.benchmark.arguments import add_measured_arguments, add_shape_arguments
from sedd_scale.benchmark.report import environment, run_measured, side_by_side
from sedd_scale.cli import add_command
from sedd_scale.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sedd_scale.benchmark.synthetic import SyntheticRun


def add_arguments(subparsers: Any) -> None:
    """Register `step` and its options."""
    parser = add_command(
        subparsers,
        "step",
        help="the whole training step",
        example="sedd-scale benchmark step --baseline --json",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "best"),
        default="best",
        help="best: that in which a matrix product is faster here (default)",
    )
    parser.add_argument(
        "--recompute", type=int, default=0, help="recompute every k-th block (default: 0, none)"
    )
    add_measured_arguments(parser, repeats=3, baseline="the textbook step")
    parser.add_argument(
        "--beside",
        metavar="MODEL",
        help="another of configs/models, measured in turn: which does more of its required FLOPs "
        "in a second",
    )
    parser.add_argument(
        "--profile", action="store_true", help="profile one more step of each side, by operation"
    )
    add_shape_arguments(parser, model="small")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report; both sides' seconds and memory."""
    from sedd_scale.benchmark.measure import median_seconds, peak_bytes
    from sedd_scale.benchmark.synthetic import LEARNING_RATE, SyntheticRun, synthetic_config
    from sedd_scale.benchmark.textbook import TextbookTrainer
    from sedd_scale.config.trunk import beyond_published
    from sedd_scale.parallel.layout import initialize_layout, launched_world_size, local_device
    from sedd_scale.planning import plan
    from sedd_scale.tracking.utilisation import matrix_product, named_peak

    if arguments.baseline and launched_world_size() > 1:
        raise ConfigError(
            f"--baseline with {launched_world_size()} processes: the textbook step knows one; "
            "leave it out"
        )
    device = local_device()
    precision = arguments.precision if arguments.precision != "best" else faster_precision(device)
    config = synthetic_config(
        arguments,
        f"parallel.recompute_every={arguments.recompute}",
        f"training.precision={precision}",
        world_size=launched_world_size(),
    )
    if arguments.baseline and (keys := beyond_published(config.model)):
        raise ConfigError(
            f"--baseline with model.{next(iter(keys))}: the textbook step knows the published "
            "trunk alone; leave one of them out"
        )
    layout = initialize_layout(
        **config.parallel.axes, sequence_parallel=config.parallel.sequence_parallel
    )
    synthetic = SyntheticRun(config, layout)
    ours = synthetic.program(synthetic.engine())
    others = []
    if arguments.beside:
        given = argparse.Namespace(**{**vars(arguments), "model": arguments.beside})
        precise = f"training.precision={precision}"
        other = synthetic_config(given, precise, world_size=launched_world_size())
        others.append(SyntheticRun(other, layout))
    size = 8192 if device.type == "cuda" else 2560
    product, product_flops = matrix_product(device, precision, size=size)
    programs: list[Callable[[], object]] = [product, ours]
    if arguments.baseline:
        textbook = TextbookTrainer(config, synthetic.graph, device, bf16=precision == "bf16")
        steps = itertools.count(1)

        def baseline() -> None:
            textbook.step(synthetic.noisy_batch(next(steps)), lr=LEARNING_RATE)

        programs.append(baseline)
    programs += [beside.program(beside.engine()) for beside in others]
    product_seconds, *seconds = median_seconds(programs, repeats=arguments.repeats)
    others_seconds = [seconds.pop() for _ in others]
    programs = programs[: 1 + len(seconds)]
    extra = [peak_bytes(program) / 1e6 for program in programs[1:]]
    if arguments.profile:
        for name, program in zip(("step", "baseline"), programs[1:]):
            if layout.rank == 0:
                print(f"{name}: share of the time by operation\n{profiled(program)}\n")
            else:
                program()

    training, model = config.training, config.model
    tokens = training.global_batch * arguments.block_length
    planned = plan(
        config,
        layout.world_size,
        vocab_size=arguments.vocab_size,
        block_length=arguments.block_length,
    )
    rows, required = rows_and_flops(synthetic, 1 + arguments.repeats)
    per_device = required / seconds[0] / layout.world_size
    beside_flops = [
        rows_and_flops(one, 1 + arguments.repeats)[1] / taken
        for one, taken in zip(others, others_seconds)
    ]
    peak = named_peak(device, precision)
    return {
        "part": "step",
        "model": arguments.model,
        "layers": model.num_layers,
        "width": model.hidden_size,
        "graph": config.graph.name,
        "dropout": model.dropout,
        "layout": config.parallel.text(layout.data),
        "batch": training.micro_batch,
        "accumulate": training.global_batch // training.micro_batch // layout.data,
        "length": arguments.block_length,
        "vocab": arguments.vocab_size,
        "dtype": precision,
        "recompute_every": config.parallel.recompute_every,
        "repeats": arguments.repeats,
        **side_by_side(seconds, extra, tokens=tokens),
        "rows": rows,
        "flops_required": required,
        "flops_dense": planned.flops.dense,
        "flops_per_token": required / tokens,
        "mfu": None if peak is None else per_device / peak,
        "mfu_of_measured_matmul": per_device / (product_flops / product_seconds),
        "measured_matmul_flops_per_second": product_flops / product_seconds,
        **_compared(arguments.beside, beside_flops, required / seconds[0]),
        "peak_mb": peak_megabytes(),
        "planned_mb": planned.heaviest.peak / 1e6,
        **environment(),
    }


def _compared(name: str | None, theirs: Sequence[float], ours: float) -> dict[str, Any]:
    """Required FLOPs in a second beside those of another model."""
    return {
        key: value
        for rate in theirs
        for key, value in (
            ("beside", name),
            ("beside_flops_per_second", rate),
            ("speed_per_flop_over_beside", ours / rate),
        )
    }


def rows_and_flops(synthetic: "SyntheticRun", step: int) -> tuple[int, float]:
    """Rows with a loss in a step over all ranks, and the FLOPs that it requires."""
    from sedd_scale.planning.flops import step_flops

    config, length = synthetic.config, synthetic.length
    rows = synthetic.layout.data * sum(
        len(batch.targets.rows_M) for batch in synthetic.micro_batches(step)
    )
    flops = step_flops(config, vocab_size=config.model.vocab_size or 0, block_length=length)
    # `required` expects the rows of an average step; these batches have their own.
    head = (flops.dense - flops.required) / (1 - flops.head_rows) if flops.head_rows < 1 else 0.0
    positions = config.training.global_batch * length
    return rows, flops.dense - head * (1 - rows / positions)


def profiled(program: Callable[[], object], *, rows: int = 14) -> str:
    """The operations that one run of `program` spends its time in, a line each, largest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        program()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = sorted(
        ((getattr(event, attribute), event.count, event.key) for event in profiler.key_averages()),
        reverse=True,
    )
    total = sum(microseconds for microseconds, *_ in found)
    return "\n".join(
        f"{microseconds / total:7.1%} {microseconds / 1e6:9.3f} s {count:6d} x {name}"
        for microseconds, count, name in found[:rows]
    )


def faster_precision(device: "torch.device") -> str:
    """fp32 or bf16, whichever multiplies matrices faster here."""
    from sedd_scale.benchmark.measure import median_seconds
    from sedd_scale.tracking.utilisation import matrix_product

    names = ("fp32", "bf16")
    products = [matrix_product(device, name, size=1024)[0] for name in names]
    seconds = median_seconds(products, repeats=5)
    return names[seconds.index(min(seconds))]


def peak_megabytes() -> float:
    """The most memory the process has held: of the GPU, or resident where there is none."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
