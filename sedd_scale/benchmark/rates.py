"""What a device reaches in each kind of work of a step, and the step that follows from it.

The rates are those that `planning.step_time` predicts with, measured at the shapes of one block:
products forward and backward, attention, and the passes over memory with their bytes as counted
there. The step itself is measured in the same rounds, so that the ratio of the two is of one
moment. With --output the rates are written for `sedd-scale plan --measured`.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sedd_scale.benchmark.arguments import add_measured_arguments, add_shape_arguments
from sedd_scale.benchmark.report import environment, run_measured
from sedd_scale.cli import add_command, given_path
from sedd_scale.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from sedd_scale.config import Config
    from sedd_scale.parallel.layout import Layout

Program = Callable[[], object]
# Numbers that an optimizer is measured on: more than caches hold.
_UPDATED = 4_000_000


def add_arguments(subparsers: Any) -> None:
    """Register `rates` and its options."""
    parser = add_command(
        subparsers,
        "rates",
        help="what this device reaches, and the step that follows from it",
        example="sedd-scale benchmark rates --model small --batch-size 32 --output rates.json",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument(
        "--output", type=given_path, metavar="FILE", help="write the rates for plan --measured"
    )
    add_measured_arguments(parser, repeats=5)
    add_shape_arguments(parser, model="small")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: rates, seconds and memory of a step, and what the model of both says."""
    from sedd_scale.benchmark.measure import median_seconds
    from sedd_scale.benchmark.step import peak_megabytes
    from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config
    from sedd_scale.parallel.layout import initialize_layout, launched_world_size, local_device
    from sedd_scale.planning import plan
    from sedd_scale.planning.step_time import Device, step_time
    from sedd_scale.tracking.utilisation import named_peak

    if arguments.output is not None and arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists already: give another file")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: there is no such folder; make it first")
    world_size, device = launched_world_size(), local_device()
    config = synthetic_config(
        arguments, f"training.precision={arguments.precision}", world_size=world_size
    )
    layout = initialize_layout(
        **config.parallel.axes, sequence_parallel=config.parallel.sequence_parallel
    )
    synthetic = SyntheticRun(config, layout)
    works = {**_products(config, device), **_attention(config, device), **_passes(config, device)}
    works |= _update(config, device)
    if layout.data > 1:
        works["node"] = _reduction(layout)
    programs = [program for program, _ in works.values()]
    *seconds, whole = median_seconds(
        [*programs, synthetic.program(synthetic.engine())], repeats=arguments.repeats
    )
    took = dict(zip(works, seconds, strict=True))
    took["attention_backward"] -= took["attention"]
    rates = {name: work / took[name] for name, (_, work) in works.items()}
    rates.setdefault("node", 0.0)
    reached = Device(
        **rates,
        network=rates["node"],
        launch=_launch_seconds(device),
        per_node=max(1, world_size),
    )
    sizes = {"vocab_size": arguments.vocab_size, "block_length": arguments.block_length}
    planned = plan(config, world_size, **sizes)
    peak = named_peak(device, arguments.precision) or rates["products"]
    predicted = step_time(config, planned, **sizes, device=reached, peak=peak)
    if arguments.output is not None and layout.rank == 0:
        arguments.output.write_text(json.dumps(dataclasses.asdict(reached), indent=1) + "\n")
    return {
        "part": "rates",
        "model": arguments.model,
        "batch": arguments.batch_size,
        "length": arguments.block_length,
        "dtype": arguments.precision,
        **{f"{name}_per_second": rate for name, rate in rates.items()},
        "launch_seconds": reached.launch,
        **{f"predicted {name}": part for name, part in predicted.parts.items()},
        "predicted_seconds": predicted.seconds,
        "seconds": whole,
        "time_of_model": whole / predicted.seconds,
        "peak_mb": peak_megabytes(),
        "planned_mb": planned.heaviest.peak / 1e6,
        **environment(),
    }


def _weights_dtype(config: "Config") -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.training.precision]


def _products(config: "Config", device: "torch.device") -> dict[str, tuple[Program, float]]:
    """The products of one block, forward and backward, and their FLOPs."""
    import torch

    rows = config.training.micro_batch * (config.data.block_length or 0)
    tensor, dtype = config.parallel.tensor, _weights_dtype(config)
    shapes = [
        (matrix.columns // tensor, matrix.rows)
        if matrix.split_dim
        else (matrix.columns, matrix.rows // tensor)
        for matrix in config.trunk.matrices
    ]
    operands = [
        [torch.rand(*shape, device=device).to(dtype) for shape in ((rows, a), (b, a), (rows, b))]
        for a, b in shapes
    ]

    def program() -> None:
        for left, weight, grad in operands:
            torch.mm(left, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), left)

    return {"products": (program, 6.0 * rows * sum(a * b for a, b in shapes))}


def _attention(config: "Config", device: "torch.device") -> dict[str, tuple[Program, float]]:
    """Attention of one block: forward, and with its backward pass, whose FLOPs come alone."""
    import torch

    from sedd_scale.model.attention import attention

    model, batch, length = config.model, config.training.micro_batch, config.data.block_length or 0
    heads = config.trunk.heads // config.parallel.tensor
    shape = (length, batch, heads, config.trunk.head_dim)
    dtype = _weights_dtype(config)
    shared = (*shape[:2], config.trunk.kv_heads // config.parallel.tensor, shape[-1])
    inputs = [
        torch.rand(*sizes, device=device).to(dtype).requires_grad_()
        for sizes in (shape, shared, shared)
    ]
    grad = torch.ones(shape, dtype=dtype, device=device)
    flops = 4.0 * length * length * batch * heads * shape[-1]

    def forward() -> "torch.Tensor":
        return attention(*inputs, backend=model.attention)

    def both() -> None:
        torch.autograd.grad(forward(), inputs, grad)

    return {"attention": (forward, flops), "attention_backward": (both, 2.5 * flops)}


def _passes(config: "Config", device: "torch.device") -> dict[str, tuple[Program, float]]:
    """What lies between one block's products, forward and backward, and its bytes."""
    import torch

    from sedd_scale.model import fused
    from sedd_scale.model.dropout import dropout
    from sedd_scale.model.rotary import RotaryAngles, rotary_table
    from sedd_scale.planning.model_states import BYTES
    from sedd_scale.planning.step_time import block_bytes

    model, batch, length = config.model, config.training.micro_batch, config.data.block_length or 0
    trunk, dtype = config.trunk, _weights_dtype(config)
    width = trunk.width
    residual = {"fp32": torch.float32, "bf16": torch.bfloat16}[model.residual_dtype]

    def of(*shape: int, dtype: "torch.dtype") -> "torch.Tensor":
        return torch.rand(*shape, device=device).to(dtype).requires_grad_()

    stream, update = (of(length, batch, width, dtype=kind) for kind in (residual, dtype))
    vectors = [of(batch, width, dtype=dtype) for _ in range(3)]
    sizes = (trunk.inner_rows, trunk.qkv_rows)
    inner, mixed = (of(length, batch, size, dtype=dtype) for size in sizes)
    bias = of(width, dtype=dtype) if trunk.mlp_bias else None
    wide_bias = of(trunk.inner_rows, dtype=dtype) if trunk.mlp_bias else None
    table = rotary_table(length, trunk.head_dim, RotaryAngles.of(model), dtype, device)
    norms = of(2 * trunk.head_dim, dtype=dtype) if trunk.qk_norm else None
    keys = torch.arange(batch, device=device)
    rate, grads = model.dropout, list["torch.Tensor"]()

    def program() -> None:
        drop = None
        if rate:
            drop = dropout(keys, length=length, width=width, rate=rate, site=0, first_position=0)
        shift, scale, gate = vectors
        after = stream
        outputs = []
        for added in (None, bias):
            normed, kept = fused.modulated_norm(
                after,
                scale.float(),
                shift,
                epsilon=model.norm_epsilon,
                dtype=dtype,
                centred=model.norm == "layernorm",
            )
            opened = gate if model.conditioning == "adaln" else None
            after = fused.gated_residual(kept, update, opened, bias_H=added, dropout=drop)
            outputs.append(normed)
        wide = fused.mlp_activation(inner, wide_bias, model.activation, overwrite=True)
        turned = fused.rotated_query_key_value(
            mixed.view(length, batch, trunk.kv_heads, -1, trunk.head_dim),
            *table,
            norms,
            model.norm_epsilon,
        )
        outputs += [after, wide, *turned]
        given = [stream, update, *vectors, bias, inner, wide_bias, mixed, norms]
        leaves = [one for one in given if one is not None]
        if not grads:
            grads.extend(torch.ones_like(output) for output in outputs)
        torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    counted = block_bytes(
        trunk,
        residual=BYTES[model.residual_dtype],
        weight=BYTES[config.training.precision],
    )
    return {"memory": (program, float(sum(counted.values()) * length * batch))}


def _update(config: "Config", device: "torch.device") -> dict[str, tuple[Program, float]]:
    """The optimizer on some numbers, the weights that it makes, and the bytes of both."""
    import torch

    from sedd_scale.planning.step_time import UPDATE_BYTES
    from sedd_scale.training.optimizer import optimizer_of

    flat = torch.nn.Parameter(torch.zeros(_UPDATED, device=device))
    flat.grad = torch.ones(_UPDATED, device=device)
    weights = torch.empty(_UPDATED, dtype=_weights_dtype(config), device=device)
    optimizer = optimizer_of(config, [flat])

    def program() -> None:
        optimizer.step()
        weights.copy_(flat.detach())

    return {"update": (program, float(UPDATE_BYTES * _UPDATED))}


def _reduction(layout: "Layout") -> tuple[Program, float]:
    """A reduce-scatter over the data-parallel ranks, and the bytes that a rank sends in it."""
    import torch
    import torch.distributed as dist

    from sedd_scale.planning.model_states import EXCHANGE_BUCKET

    whole = torch.zeros(EXCHANGE_BUCKET // layout.data * layout.data, device=layout.device)
    part = whole[: len(whole) // layout.data].clone()

    def program() -> None:
        dist.reduce_scatter_tensor(part, whole, group=layout.data_group)

    return program, 4.0 * len(whole) * (layout.data - 1) / layout.data


def _launch_seconds(device: "torch.device") -> float:
    """The host's time to start a kernel; 0 on a CPU, which runs it at once."""
    import time

    import torch

    if device.type != "cuda":
        return 0.0
    one = torch.zeros((), device=device)
    one.add_(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1000):
        one.add_(1)
    seconds = (time.perf_counter() - start) / 1000
    torch.cuda.synchronize()
    return seconds
