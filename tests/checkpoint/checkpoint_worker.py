"""One process of the launches that test fragments and checkpoints; see `launch` in the tests.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python checkpoint_worker.py SCENARIO FOLDER

A process takes several layouts one after the other, since its imports cost more than its work. What
it finds is written to FOLDER/SCENARIO.json by the first process; laws that need all processes are
asserted here.
"""

import dataclasses
import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First of all: it readies DeepSpeed for the CPU.
from tests.checkpoint.checkpointed_run import Run, Spec  # isort: skip

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from sedd_scale.errors import CheckpointError
from sedd_scale.parallel.layout import initialize_layout, shutdown
from sedd_scale.planning.model_states import STATE_KEYS


def assert_equal(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def fragments_scenario(_: Path) -> dict[str, Any]:
    """Two processes: every engine and precision."""
    checked = []
    for spec, piped in [
        (Spec(stage=1), False),
        (Spec(stage=2), False),
        (Spec(stage=3), False),
        (Spec(stage=1, bf16=True), False),
        (Spec(stage=2, bf16=True), False),
        (Spec(stage=3, bf16=True), False),
        (Spec(tensor=2, stage=3), False),
        (Spec(stage=1), True),
        (Spec(pipeline=2, stage=1), True),
        (Spec(pipeline=2, stage=1, bf16=True), True),
    ]:
        run = Run(spec, pipeline_engine=piped)
        check_fragments(run)
        checked.append(f"{spec} {type(run.engine).__name__} {type(run.engine.optimizer).__name__}")
    return {"checked": checked}


def check_fragments(run: Run) -> None:
    fragments = run.fragments
    assert fragments.get_step() == 0
    fragments.ensure_state()
    initial = run.fragment_copies()
    for (name, key), flat in initial.items():
        if key == "ema":
            assert torch.equal(flat, initial[name, "master"])
        elif key != "master":
            assert not flat.any()

    run.train(range(2))
    assert fragments.get_step() == 2
    for key in STATE_KEYS:
        for logical, shard in zip(run.parameters, run.whole_shards(key).values(), strict=True):
            fragment = fragments.get(logical, key)
            if fragment is not None:
                end = fragment.start + fragment.flat.numel()
                assert torch.equal(fragment.flat, shard.flatten()[fragment.start : end])

    # In the averaged weights' place and back: nothing changes by a bit, nor does what follows.
    state, weights = run.fragment_copies(), run.working_weights()
    averages = run.whole_shards("ema")
    with fragments.ema_weights():
        for name, value in run.working_weights().items():
            assert torch.equal(value, averages[name].to(value.dtype)), name
            assert not torch.equal(value, weights[name]), name
        if not run.piped:
            run.engine.eval()
            with torch.no_grad():
                run.engine(next(run.micro_batches(0)))
            run.engine.train()
    assert_equal(run.fragment_copies(), state)
    assert_equal(run.working_weights(), weights)

    # What is written to the masters reaches the weights that the forward pass reads.
    for logical in run.parameters:
        fragment = fragments.get(logical, "master")
        if fragment is not None:
            fragment.flat.mul_(1.5)
    fragments.refresh_parameters()
    masters = run.whole_shards("master")
    for name, value in run.working_weights().items():
        assert torch.equal(value, masters[name].to(value.dtype)), name
    assert all(loss < 100 for loss in run.train(range(2, 3)))
    fragments.set_step(40)
    assert fragments.get_step() == 40

    if run.layout.data > 1:  # a gap is noticed by every rank
        name = next(n for n, place in fragments._places.items() if place is not None)
        names: list[Any] = [None] * run.layout.data
        dist.all_gather_object(names, name, group=run.layout.data_group)
        if run.layout.data_rank == 0:
            fragments._places[name] = dataclasses.replace(fragments._places[name], start=1)
        try:
            fragments._assert_tiled()
        except AssertionError as error:
            assert names[0] in str(error)
        else:
            raise AssertionError("a gap was not noticed")


def save_scenario(folder: Path) -> dict[str, Any]:
    """Four processes: save under one layout, load under it and under others."""
    spec = Spec(tensor=2, stage=3)
    run = Run(spec)
    run.train(range(3))
    run.save(folder / "zero3", 3)
    tensors = run.logical_tensors()
    if run.layout.rank == 0:
        torch.save(tensors, folder / "tensors.pt")
    results: dict[str, Any] = {"reference": run.train(range(3, 6))}

    same = Run(dataclasses.replace(spec, seed=1))
    meta = same.load(folder / "zero3")
    assert meta["step"] == 3 and meta["optimizer_step"] == 3 and same.fragments.get_step() == 3
    same.save(folder / "again", 3)
    results["same layout"] = same.train(range(3, 6))

    pipeline = Run(Spec(tensor=2, pipeline=2, seed=1))
    pipeline.load(folder / "zero3" / "checkpoints")
    pipeline.save(folder / "pipeline", 3)
    results["TP2 PP2 ZeRO1"] = pipeline.train(range(3, 6))

    data = Run(Spec(stage=2, seed=1))
    data.load(folder / "pipeline")
    results["DP4 ZeRO2, from TP2 PP2"] = data.train(range(3, 6))

    bf16 = Run(Spec(tensor=2, bf16=True, seed=1))
    bf16.load(folder / "zero3" / "checkpoints" / "step-3")
    results["bf16 from fp32"] = bf16.train(range(3, 5))
    bf16.save(folder / "bf16", 5)
    results["bf16"] = bf16.train(range(5, 8))
    bf16 = Run(Spec(tensor=2, bf16=True, seed=1))
    bf16.load(folder / "bf16")
    results["bf16 resumed"] = bf16.train(range(5, 8))

    other = Run(Spec(tensor=2, pipeline=2, vocab=103))
    other.fragments.ensure_state()
    state, weights = other.fragment_copies(), other.working_weights()
    if other.layout.rank == 0:
        shutil.copytree(folder / "zero3", folder / "short")
        os.truncate(folder / "short" / "checkpoints" / "step-3" / "__2_0.distcp", 500)
    results["load errors"] = [
        error_of(lambda path=path: other.load(folder / path))
        for path in ("zero3", "nothing", "short")
    ]
    assert_equal(other.fragment_copies(), state)
    assert_equal(other.working_weights(), weights)

    results["save errors"] = [error_of(lambda: other.save(folder / "tensors.pt", 1))]
    if other.layout.rank == 3:
        FileSystemWriter.write_data = full_disk
    results["save errors"].append(error_of(lambda: other.save(folder / "zero3", 4)))
    return results


def full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def error_of(call: Callable[[], Any]) -> str:
    """The CheckpointError that every process must raise alike."""
    try:
        call()
    except CheckpointError as error:
        message = str(error)
    else:
        message = "no error"
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    assert len(set(messages)) == 1, messages
    return message


def two_scenario(folder: Path) -> dict[str, Any]:
    """Two processes load what four saved."""
    results = {}
    for name, spec in {
        "DP2 ZeRO1": Spec(stage=1, seed=1),
        "TP2 ZeRO2": Spec(tensor=2, stage=2, seed=1),
        "PP2": Spec(pipeline=2, seed=1),
    }.items():
        run = Run(spec)
        run.load(folder / "zero3")
        results[name] = run.train(range(3, 6))
    return results


def one_scenario(folder: Path) -> dict[str, Any]:
    """One process loads what four saved, and saves often."""
    run = Run(Spec(seed=1))
    run.load(folder / "zero3")
    results: dict[str, Any] = {"DP1": run.train(range(3, 6))}
    kept = folder / "kept"
    (kept / "checkpoints" / "step-9.tmp").mkdir(parents=True)
    listings = []
    for step in (5, 6, 7, 7, 8):
        run.save(kept, step, keep=2)
        names = sorted(path.name for path in (kept / "checkpoints").iterdir())
        listings.append([*names, (kept / "checkpoints" / "latest").read_text()])
    results["listings"] = listings
    return results


def reform(num_processes: int) -> bool:
    """Go on with the first `num_processes` as if newly launched; whether this one is among them."""
    rank = dist.get_rank()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port)
    shutdown()
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    os.environ["MASTER_PORT"] = str(port[0])
    os.environ["WORLD_SIZE"] = str(num_processes)
    if rank >= num_processes:
        return False
    initialize_layout()
    return True


def resume_scenario(folder: Path) -> dict[str, Any]:
    """Four processes, then two, then one."""
    results = save_scenario(folder)
    for num_processes, scenario in ((2, two_scenario), (1, one_scenario)):
        if not reform(num_processes):
            return {}
        results |= scenario(folder)
    return results


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    scenarios = {"fragments": fragments_scenario, "resume": resume_scenario}
    results = scenarios[scenario](folder)
    if os.environ["RANK"] == "0":
        (folder / f"{scenario}.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
