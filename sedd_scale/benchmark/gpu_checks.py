"""What a GPU must get right before its speed counts: kernels, losses, waits. A check a process.

    python -m sedd_scale.benchmark.gpu_checks kernels|losses|waits [--precision fp32|bf16]

Each prints one JSON object. They run on a CPU as well, where kernels are PyTorch's own.
"""

import argparse
import json
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config
from sedd_scale.model import fused
from sedd_scale.model.dropout import dropout
from sedd_scale.parallel import score_kernel
from sedd_scale.parallel.layout import initialize_layout, local_device, shutdown
from sedd_scale.parallel.score_kernel import Coefficients, LawCoefficients, RowColumns

STORED = Path(__file__).with_name("cpu_losses.json")
STEPS = 50


def kernels() -> dict[str, Any]:
    """Largest differences of kernels from PyTorch's own passes, relative to the largest number."""
    device = local_device()
    found: dict[str, Any] = {"has_kernels": False}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(257, 50264, generator=generator)
        logits_mW = logits.to(device, dtype)[:, :50257]
        columns = RowColumns(*torch.randint(50257, (2, 257), generator=generator).to(device))
        numbers_4m = torch.randn(4, 257, generator=generator).to(device)
        found["has_kernels"] = score_kernel.has_kernel(logits_mW)
        ours = _chunk(logits_mW, columns, numbers_4m)
        with unittest.mock.patch.object(score_kernel, "has_kernel", lambda table_mW: False):
            plain = _chunk(logits_mW, columns, numbers_4m)
        _compare(found, ours, plain, dtype)
        stream_LBH = torch.randn(256, 8, 768, generator=generator).to(device, dtype)
        ours = _passes(stream_LBH)
        with unittest.mock.patch.object(fused, "compiles_kernels", lambda: False):
            plain = _passes(stream_LBH)
        _compare(found, ours, plain, dtype)
    return found


def _compare(
    found: dict[str, Any], ours: dict[str, Tensor], plain: dict[str, Tensor], dtype: torch.dtype
) -> None:
    for name, part in ours.items():
        difference = float((part - plain[name]).abs().max() / plain[name].abs().max())
        found[f"{name} {str(dtype).removeprefix('torch.')}"] = difference


def _passes(stream_LBH: Tensor) -> dict[str, Tensor]:
    """Gradients through a norm, a gate with bias and dropout, and a GELU, in float32."""
    length, batch, width = stream_LBH.shape
    device, dtype = stream_LBH.device, stream_LBH.dtype
    keys_B, places = torch.arange(batch, device=device), {"site": 0, "first_position": 0}
    drop = dropout(keys_B, length=length, width=width, rate=0.1, **places)
    ones_BH = torch.ones(batch, width, device=device)
    names = ("stream", "scale", "shift", "gate", "bias")
    values = (stream_LBH, ones_BH, ones_BH, ones_BH, ones_BH[0].to(dtype))
    inputs = [value.clone().requires_grad_() for value in values]
    stream, scale, shift, gate, bias = inputs
    normed, kept = fused.modulated_norm(stream, scale, shift, epsilon=1e-5, dtype=dtype)
    inner = fused.mlp_activation(normed, bias, "gelu", overwrite=False)
    output = fused.gated_residual(kept, inner, gate, bias_H=bias, dropout=drop)
    grads = torch.autograd.grad(output, inputs, stream_LBH.cos())
    return {f"passes' {name}": grad.float() for name, grad in zip(names, grads, strict=True)}


def _chunk(logits_mW: Tensor, columns: RowColumns, numbers_4m: Tensor) -> dict[str, Tensor]:
    """What the passes over one chunk find, in float32."""
    table_mW, gradient_mW = logits_mW.clone(), torch.empty_like(logits_mW)
    statistics = score_kernel.chunk_statistics(table_mW, columns)
    found = {"sum_exp": statistics.sum_exp, "total": statistics.total}
    _, found["column_sums"] = score_kernel.chunk_gradient(
        statistics, columns, Coefficients(*numbers_4m[:3]), gradient_mW
    )
    found["gradient"] = gradient_mW.float()
    statistics = score_kernel.chunk_statistics(logits_mW.clone(), columns)
    law = score_kernel.chunk_law(statistics, columns, numbers_4m[3].exp())
    statistics, found["log_total"], found["share_total"] = law
    score_kernel.chunk_gradient(statistics, columns, LawCoefficients(*numbers_4m), gradient_mW)
    found["law's gradient"] = gradient_mW.float()
    return {name: part for name, part in found.items() if part is not None}


def run_of(precision: str) -> SyntheticRun:
    """A small run with dropout, the same on every device."""
    arguments = argparse.Namespace(
        model="tiny",
        vocab_size=512,
        block_length=64,
        batch_size=4,
        accumulate=2,
        overrides=["model.dropout=0.1", f"training.precision={precision}"],
    )
    return SyntheticRun(synthetic_config(arguments, world_size=1), initialize_layout())


def losses(precision: str) -> dict[str, Any]:
    """Losses of `STEPS` steps, and how far they are from those stored of a CPU in fp32."""
    run = run_of(precision)
    step = run.program(run.engine())
    found = [step().loss for _ in range(STEPS)]
    stored = json.loads(STORED.read_text()) if STORED.is_file() else found
    apart = max(abs(ours - cpu) / abs(cpu) for ours, cpu in zip(found, stored, strict=True))
    return {"precision": precision, "largest_difference": apart, "losses": found}


def waits() -> dict[str, Any]:
    """A step in which any wait of the host is an error; the outcome is read after it."""
    run = run_of("bf16")
    engine = run.engine()
    for step in (1, 2, 3):
        engine.train_step(run.micro_batches(step), lr=1e-4)
    batches = run.micro_batches(4)
    outcome, engine._gate.outcome = engine._gate.outcome, lambda: None  # type: ignore
    on_gpu = run.layout.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(batches, lr=1e-4)
    except RuntimeError as error:
        return {"waits": str(error).splitlines()[0], "tried": on_gpu}
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        engine._gate.outcome = outcome  # type: ignore[method-assign]
    return {"waits": None, "tried": on_gpu, "loss": engine._gate.outcome().numbers.loss}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m sedd_scale.benchmark.gpu_checks")
    parser.add_argument("check", choices=("kernels", "losses", "waits"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--store", action="store_true", help="losses: keep them as the CPU's")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1 if arguments.store else torch.get_num_threads())
    if arguments.check == "losses":
        found = losses(arguments.precision)
        if arguments.store:
            STORED.write_text(json.dumps(found["losses"]) + "\n")
    else:
        found = {"kernels": kernels, "waits": waits}[arguments.check]()
    print(json.dumps(found))
    if torch.distributed.is_initialized():
        shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
