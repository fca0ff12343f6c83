"""AdamW with the moving average in its state, beside torch's AdamW and an average in a loop.

Both sides update the parameters of a whole model from the same gradients.
"""

import argparse
from typing import Any

from sedd_scale.benchmark.arguments import add_shape_arguments
from sedd_scale.benchmark.report import environment, print_report
from sedd_scale.cli import add_command


def add_arguments(subparsers: Any) -> None:
    """Register `optimizer` and its options."""
    parser = add_command(
        subparsers,
        "optimizer",
        help="the update of weights and their average",
        example="sedd-scale benchmark optimizer --baseline --json",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--baseline", action="store_true", help="measure torch's AdamW too")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    add_shape_arguments(parser, model="small")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure both sides and report."""
    import torch

    torch.set_num_threads(arguments.threads)
    print_report(measure(arguments), as_json=arguments.json)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    import torch
    from torch import nn

    from sedd_scale.benchmark.measure import median_seconds, peak_bytes
    from sedd_scale.benchmark.synthetic import synthetic_config
    from sedd_scale.benchmark.textbook import TextbookNetwork, update_averages
    from sedd_scale.diffusion.graphs import make_graph
    from sedd_scale.parallel.layout import local_device
    from sedd_scale.training.loop import make_optimizer

    config = synthetic_config(arguments, world_size=1)
    device, ema_decay = local_device(), config.optimizer.ema_decay
    num_states = make_graph(config.graph.name, arguments.vocab_size).num_states
    with torch.device("meta"):
        shapes = [weight.shape for weight in TextbookNetwork(config, num_states).parameters()]

    # ZeRO hands the optimizer one flat tensor; the textbook keeps one a parameter.
    num_parameters = sum(shape.numel() for shape in shapes)
    flat = nn.Parameter(torch.randn(num_parameters, device=device))
    flat.grad = torch.randn(num_parameters, device=device)
    optimizer = make_optimizer([flat], config)
    programs: list[Any] = [optimizer.step]
    if arguments.baseline:
        weights = [
            nn.Parameter(part.clone().view(shape))
            for part, shape in zip(
                flat.detach().split([shape.numel() for shape in shapes]), shapes, strict=True
            )
        ]
        for weight, part in zip(weights, flat.grad.split([w.numel() for w in weights])):
            weight.grad = part.clone().view_as(weight)
        adam = torch.optim.AdamW(weights, lr=config.optimizer.lr, weight_decay=0.0)
        averages = [weight.detach().clone() for weight in weights]
        updates = 0

        def baseline() -> None:
            nonlocal updates
            updates += 1
            adam.step()
            update_averages(averages, weights, ema_decay, updates)

        programs.append(baseline)
    seconds = median_seconds(programs, repeats=arguments.repeats)
    extra = [peak_bytes(program) / 1e6 for program in programs]
    with_baseline = len(programs) > 1
    return {
        "part": "optimizer",
        "model": arguments.model,
        "parameters": num_parameters,
        "repeats": arguments.repeats,
        "seconds": seconds[0],
        "baseline_seconds": seconds[1] if with_baseline else None,
        "speedup": seconds[1] / seconds[0] if with_baseline else None,
        "parameters_per_second": num_parameters / seconds[0],
        # Weight, two moments and average are read and written, the gradient is read.
        "bytes_per_second": 4 * 9 * num_parameters / seconds[0],
        "extra_mb": extra[0],
        "baseline_extra_mb": extra[1] if with_baseline else None,
        **environment(),
    }
