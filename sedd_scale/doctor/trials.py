"""What the doctor runs in processes of their own: imports, an all-reduce, a training step.

    python -m sedd_scale.doctor.trials imports NAME...
    python -m sedd_scale.doctor.trials devices
    python -m sedd_scale.doctor.trials all_reduce BACKEND RANK WORLD_SIZE FILE
    python -m sedd_scale.doctor.trials train FOLDER

Each prints JSON objects, a line each; whatever kills a process leaves the doctor itself alive.
"""

import datetime
import importlib
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from sedd_scale.files.package import PACKAGE

NUMBERS = 1 << 20
REPEATS = 3
LIMIT_SECONDS = 120.0
SMALL_RUN = (
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.cond_dim=32",
    "training.steps=1",
    "training.global_batch=8",
    "training.micro_batch=4",
    "training.valid_every=1",
    "training.valid_blocks=8",
    "optimizer.warmup_steps=1",
    "logging.every=1",
)


def say(**values: Any) -> None:
    """Print one JSON object, at once."""
    print(json.dumps(values), flush=True)


def imports(names: list[str]) -> None:
    """Import modules one after the other; an object each, before and after."""
    for name in names:
        say(module=name, state="begun")
        try:
            importlib.import_module(name)
        except Exception as error:  # of any package: whatever it raises is what is wrong with it
            reason = (str(error).strip().splitlines() or [""])[0]
            say(module=name, state="failed", reason=f"{type(error).__name__}: {reason}")
        else:
            say(module=name, state="good")


def devices() -> None:
    """What torch was built for and which GPUs answer."""
    import torch
    import torch.distributed as dist

    from sedd_scale.cluster.node_checks import examine_devices

    cuda = torch.cuda.is_available()
    nccl = dist.is_nccl_available()
    say(
        built_for=torch.version.cuda,
        names=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if cuda
        else [],
        memory_gb=torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if nccl and cuda else None,
        has_nccl=nccl,
        has_gloo=dist.is_gloo_available(),
        threads=torch.get_num_threads(),
        **examine_devices(),
    )


def all_reduce(backend: str, rank: int, world_size: int, file: str) -> None:
    """Sum numbers over all processes and check the sum; rank 0 says how long it took.

    Raises:
        RuntimeError: no connection, or another sum.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=LIMIT_SECONDS),
    )
    seconds = []
    for _ in range(REPEATS):
        numbers = torch.full((NUMBERS,), float(rank + 1), device=device)
        start = time.perf_counter()
        dist.all_reduce(numbers)
        total = float(numbers[-1])  # waits for the device
        seconds.append(time.perf_counter() - start)
        if total != world_size * (world_size + 1) / 2:
            raise RuntimeError(f"the sum of 1 to {world_size} came out as {total}")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        say(seconds=min(seconds), megabytes=4 * NUMBERS / 1e6)


def train(folder: Path) -> None:
    """Prepare a little text and train on it for one step, with a validation and a checkpoint.

    Raises:
        RuntimeError: a number that is not finite, or no checkpoint.
    """
    import torch

    from sedd_scale.checkpoint.directory import find_checkpoint
    from sedd_scale.config import Config
    from sedd_scale.parallel.layout import shutdown
    from sedd_scale.preparation.prepare import prepare
    from sedd_scale.training.loop import train as train_run

    for number, source in enumerate(sorted(PACKAGE.glob("d*/*.py"))):
        (folder / f"{number}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    prepare(
        [str(folder / "*.txt")],
        output=folder / "data",
        block_length=64,
        tokenizer="bytes",
        valid_fraction=0.2,
        processes=1,
    )
    on_gpu = torch.cuda.is_available()
    precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    config = Config().override(
        *SMALL_RUN, f"training.precision={precision}", f"data.path={folder / 'data'}"
    )
    start = time.perf_counter()
    finished = train_run(config, folder / "run")
    seconds = time.perf_counter() - start
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    numbers: dict[str, Any] = {}
    for line in lines:
        numbers.update(json.loads(line))
    checkpoint = find_checkpoint(folder / "run")
    shutdown()
    loss, bound = numbers.get("loss"), numbers.get("valid_nats_per_token")
    if not finished or loss is None or bound is None or not math.isfinite(loss + bound):
        raise RuntimeError(f"one step gave the loss {loss} and the validation bound {bound}")
    say(
        device="GPU" if on_gpu else "CPU",
        precision=precision,
        loss=loss,
        bound=bound,
        checkpoint=checkpoint.name,
        seconds=seconds,
    )


def main(words: list[str]) -> None:
    """Run the trial that the first word names."""
    warnings.filterwarnings("ignore")
    trial, *rest = words
    if trial == "imports":
        imports(rest)
    elif trial == "devices":
        devices()
    elif trial == "all_reduce":
        backend, rank, world_size, file = rest
        all_reduce(backend, int(rank), int(world_size), file)
    elif trial == "train":
        train(Path(rest[0]))
    else:
        raise ValueError(trial)


if __name__ == "__main__":
    main(sys.argv[1:])
