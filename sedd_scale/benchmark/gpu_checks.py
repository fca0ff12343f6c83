"""What a GPU must get right before its speed counts: kernels, losses, waits. A check a process.

    python -m sedd_scale.benchmark.gpu_checks kernels|losses|waits [--precision fp32|bf16]

Each prints one JSON object. They run on a CPU as well, where kernels are PyTorch's own.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config
from sedd_scale.parallel.layout import initialize_layout, local_device, shutdown

STORED = Path(__file__).with_name("cpu_losses.json")
STEPS = 50


def kernels() -> dict[str, Any]:
    """Largest differences of the loss's kernels from PyTorch's path, relative to the largest."""
    from sedd_scale.parallel import score_kernel
    from sedd_scale.parallel.score_kernel import Coefficients, RowColumns

    device = local_device()
    found: dict[str, Any] = {"has_kernels": False}
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(257, 50264, generator=generator)
        logits_mW = logits.to(device, dtype)[:, :50257]
        target_m, own_m = torch.randint(50257, (2, 257), generator=generator).to(device)
        columns = RowColumns(target_m, own_m)
        coefficients = Coefficients(*torch.randn(3, 257, generator=generator).to(device))
        found["has_kernels"] = score_kernel.has_kernel(logits_mW)
        both = []
        for path in ((score_kernel.chunk_statistics, score_kernel.chunk_gradient), _by_torch()):
            statistics = path[0](logits_mW.clone(), columns)
            gradient, sums = path[1](statistics, columns, coefficients)
            both.append((statistics.sum_exp, statistics.total, gradient.float(), sums))
        names = ("sum_exp", "total", "gradient", "column_sums")
        for name, ours, plain in zip(names, *both, strict=True):
            difference = float((ours - plain).abs().max() / plain.abs().max())
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = difference
    return found


def _by_torch() -> tuple[Any, Any]:
    from sedd_scale.parallel import score_kernel

    return score_kernel._torch_statistics, score_kernel._torch_gradient


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
    engine = run.engine()
    found = [run.train_step(engine, step).loss for step in range(1, STEPS + 1)]
    stored = json.loads(STORED.read_text()) if STORED.is_file() else found
    apart = max(abs(ours - cpu) / abs(cpu) for ours, cpu in zip(found, stored, strict=True))
    return {"precision": precision, "largest_difference": apart, "losses": found}


def waits() -> dict[str, Any]:
    """A step in which any wait of the host is an error; the outcome is read after it."""
    run = run_of("bf16")
    engine = run.engine()
    for step in (1, 2, 3):
        run.train_step(engine, step)
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
