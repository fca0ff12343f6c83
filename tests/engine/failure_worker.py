"""Training steps that go wrong on purpose; each rank prints what it was told.

    torchrun --nproc-per-node N failure_worker.py JOBS.json

JOBS.json lists {"plant": NAME, "overrides": [...]}; see PLANTS for the names. One line a job and
rank goes to JOBS.json.RANK: what it says of its step.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.filterwarnings("ignore", module=r"megatron\.")

import torch  # noqa: E402

from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config  # noqa: E402
from sedd_scale.engine.engine import Engine  # noqa: E402
from sedd_scale.parallel.layout import (  # noqa: E402
    Layout,
    initialize_layout,
    launched_world_size,
    leave_layout,
    shutdown,
)


def nan_weight(engine: Engine, layout: Layout) -> None:
    """One number of a weight of the last block, on the highest rank that updates a part of it."""
    if layout.rank == layout.world_size - 1:
        for logical in engine.parameters:
            if logical.name == "blocks.1.mlp.linear_fc1.weight":
                fragment = engine.fragments.get(logical, "master")
                assert fragment is not None
                fragment.flat[-1] = math.nan
    engine.fragments.refresh_parameters()


def huge_weights(engine: Engine, layout: Layout) -> None:
    """A finite block weight that makes infinite hidden states."""
    fill(engine, "blocks.1.mlp.linear_fc2.weight", torch.finfo(torch.float32).max)


def huge_logits(engine: Engine, layout: Layout) -> None:
    """A finite bias whose exponential is too large."""
    fill(engine, "head.linear.bias", 200.0)


def fill(engine: Engine, name: str, value: float) -> None:
    """Give a weight one value, in the masters and in what the network computes with."""
    for logical in engine.parameters:
        fragment = engine.fragments.get(logical, "master")
        if logical.name == name and fragment is not None:
            fragment.flat.fill_(value)
    engine.fragments.refresh_parameters()


def stray_weight(engine: Engine, layout: Layout) -> None:
    """A number that the network computes with and that is not its master's."""
    for logical in engine.parameters:
        if logical.name == "blocks.1.mlp.linear_fc1.weight":
            logical.parameter.detach().view(-1)[0] = math.nan


PLANTS: dict[str, Callable[[Engine, Layout], None]] = {
    "nan_weight": nan_weight,
    "huge_weights": huge_weights,
    "huge_logits": huge_logits,
    "stray_weight": stray_weight,
}


def fail(plant: str, overrides: list[str]) -> str:
    """Make one good step, plant the fault, and return what the next step says."""
    arguments = argparse.Namespace(
        model="tiny",
        vocab_size=50,
        batch_size=2,
        block_length=16,
        accumulate=4,
        overrides=overrides,
    )
    config = synthetic_config(arguments, "model.num_layers=2", world_size=launched_world_size())
    parallel = config.parallel
    layout = initialize_layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence_parallel=parallel.sequence_parallel,
    )
    run = SyntheticRun(config, layout)
    engine = run.engine()
    run.train_step(engine, 0)
    PLANTS[plant](engine, layout)
    micro_batches = run.micro_batches(1)
    numbers, applied = engine.train_step(micro_batches, lr=1e-3)
    message = "no error"
    if not applied:
        message = f"step {engine.fragments.get_step()} has loss {numbers.loss}: "
        message += engine.explain(micro_batches)
    leave_layout()
    return message


def main(jobs_file: Path) -> None:
    torch.set_num_threads(1)
    messages = [fail(job["plant"], job["overrides"]) for job in json.loads(jobs_file.read_text())]
    rank = torch.distributed.get_rank()
    Path(f"{jobs_file}.{rank}").write_text(json.dumps(messages))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
