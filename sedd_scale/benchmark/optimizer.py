"""AdamW with the moving average in its state, beside torch's AdamW and an average in a loop.

Both sides update the parameters of a whole model from the same gradients.
"""

import argparse
import functools
from typing import Any

from sedd_scale.benchmark.arguments import add_measured_arguments, add_shape_arguments
from sedd_scale.benchmark.report import environment, run_measured, side_by_side
from sedd_scale.cli import add_command


def add_arguments(subparsers: Any) -> None:
    """Register `optimizer` and its options."""
    parser = add_command(
        subparsers,
        "optimizer",
        help="the update of weights and their average",
        example="sedd-scale benchmark optimizer --baseline --json",
    )
    add_measured_arguments(parser, repeats=5, baseline="torch's AdamW")
    add_shape_arguments(parser, model="small")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    import torch
    from torch import nn

    from sedd_scale.benchmark.measure import median_seconds, peak_bytes
    from sedd_scale.benchmark.synthetic import synthetic_config
    from sedd_scale.benchmark.textbook import TextbookNetwork, update_averages
    from sedd_scale.diffusion.graphs import make_graph
    from sedd_scale.parallel.layout import local_device
    from sedd_scale.training.optimizer import optimizer_of

    config = synthetic_config(arguments, world_size=1)
    device, ema_decay = local_device(), config.optimizer.ema_decay
    num_states = make_graph(config.graph.name, arguments.vocab_size).num_states
    with torch.device("meta"):
        shapes = [weight.shape for weight in TextbookNetwork(config, num_states).parameters()]

    # ZeRO hands the optimizer one flat tensor; the textbook keeps one a parameter.
    num_parameters = sum(shape.numel() for shape in shapes)
    flat = nn.Parameter(torch.randn(num_parameters, device=device))
    flat.grad = torch.randn(num_parameters, device=device)
    optimizer = optimizer_of(config, [flat])
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
    return {
        "part": "optimizer",
        "model": arguments.model,
        "parameters": num_parameters,
        "repeats": arguments.repeats,
        **side_by_side(seconds, extra),
        "parameters_per_second": num_parameters / seconds[0],
        # Weight, two moments and average are read and written, the gradient is read.
        "bytes_per_second": 4 * 9 * num_parameters / seconds[0],
        **environment(),
    }
