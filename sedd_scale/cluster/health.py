"""Checks the nodes of a job before its work begins, and names the bad ones.

    srun python -m sedd_scale.cluster.health --folder runs/a/slurm

Every task runs it. The first task of each node examines the node; the first of all gathers the
reports, compares clocks, and asks all for an all-reduce. stderr gets a table, stdout's last line
the names of bad nodes, and the exit code is 3 where there are any, else 1 where the all-reduce
failed and nobody can be blamed.
"""

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_scale.cli import given_path, make_parser, run_command
from sedd_scale.cluster.node_checks import Limits, examine_node, problems_of
from sedd_scale.cluster.restarts import EXIT_BAD_NODES
from sedd_scale.files.task_environment import expand_counts

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_NO_CULPRIT = 1
ALL_REDUCE_MB, REPEATS = 64, 3
LEAVE_SECONDS = 5.0


def nodes_of_step(environment: Mapping[str, str]) -> tuple[list[str], list[int]]:
    """Names of the step's nodes, and the rank of each one's first task."""
    listed = environment.get("SLURM_STEP_NODELIST", environment.get("SLURMD_NODENAME", "localhost"))
    names = [listed]
    if "SLURM_STEP_NODELIST" in environment:
        words = ["scontrol", "show", "hostnames", listed]
        names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    counts = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return names, [sum(counts[:node]) for node in range(len(names))]


def health_command(arguments: argparse.Namespace) -> int:
    """Examine, gather and judge; what every task of the step runs."""
    import torch.distributed as dist

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    deadline = time.monotonic() + arguments.seconds
    store: dist.Store = dist.HashStore()
    if world_size > 1:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=None,
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=arguments.seconds),
        )
    store.set_timeout(datetime.timedelta(seconds=arguments.seconds))
    names, leaders = nodes_of_step(os.environ)
    if rank == 0:
        seen = arguments.folder / f".health-of-{os.environ.get('SLURM_JOB_ID', 'none')}"
        try:
            seen.touch()
            return _first(arguments, store, seen, names, leaders, deadline)
        finally:
            seen.unlink(missing_ok=True)
    if rank in leaders:
        _answer(arguments, store, names[leaders.index(rank)])
    _all_reduce_when_asked(store, rank, world_size, arguments.seconds)
    with contextlib.suppress(dist.DistError):  # the first task has left before
        store.add("left", 1)
    return 0


def _first(
    arguments: argparse.Namespace,
    store: "Store",
    seen: Path,
    names: Sequence[str],
    leaders: Sequence[int],
    deadline: float,
) -> int:
    """The first task's part."""
    store.set("folder", str(seen))
    limits = Limits(
        memory_gb=arguments.min_memory_gb, disk_gb=arguments.min_disk_gb, skew=arguments.max_skew
    )
    problems: dict[str, list[str]] = {}
    reports: dict[str, dict[str, Any]] = {}
    for name, leader in zip(names, leaders):
        if leader == 0:
            reports[name] = examine_node(arguments.folder, os.environ)
        elif not _wait_for(store, f"report/{name}", deadline):
            problems[name] = [f"no answer within {arguments.seconds:g} s"]
            continue
        else:
            reports[name] = json.loads(store.get(f"report/{name}"))
            reports[name].update(_compare_clocks(store, name, deadline))
        if found := problems_of(reports[name], limits):
            problems[name] = found
    trouble, took = None, None
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        # A bad node would keep the others waiting.
        store.set("go", "no" if problems else "yes")
        if not problems:
            took, trouble, silent = _all_reduce(store, world_size, deadline)
            for name, leader in zip(names, leaders):
                end = ([*leaders, world_size])[leaders.index(leader) + 1]
                if lost := sorted(silent & set(range(leader, end))):
                    problems[name] = [f"ranks {lost} did not end the all-reduce"]
            if len(problems) == len(names):
                trouble = trouble or "; ".join(problems.pop(name)[0] for name in names)
        _let_others_leave(store, world_size)
    _show(names, reports, problems, took, trouble)
    print(" ".join(problems), flush=True)
    if problems:
        return EXIT_BAD_NODES
    return EXIT_NO_CULPRIT if trouble else 0


def _answer(arguments: argparse.Namespace, store: "Store", name: str) -> None:
    """A node's part: its report, and the time when asked."""
    report = examine_node(arguments.folder, os.environ)
    # Not by its name alone, which a network file system may remember as absent.
    seen = Path(store.get("folder").decode())
    report["same_folder"] = "error" in report or seen.name in os.listdir(seen.parent)
    store.set(f"report/{name}", json.dumps(report))
    store.wait([f"time?/{name}"])
    store.set(f"time/{name}", repr(time.time()))


def _compare_clocks(store: "Store", name: str, deadline: float) -> dict[str, float]:
    """Seconds by which a node's clock is ahead of this one's, and how uncertain that is."""
    before = time.time()
    store.set(f"time?/{name}", "")
    if not _wait_for(store, f"time/{name}", deadline):
        return {}
    there = float(store.get(f"time/{name}"))
    after = time.time()
    return {"skew": there - (before + after) / 2, "skew_error": (after - before) / 2}


def _all_reduce_when_asked(store: "Store", rank: int, world_size: int, seconds: float) -> None:
    """The other tasks' part; what they say, the first one tells."""
    if store.get("go") != b"yes":
        return
    try:
        took = time_all_reduce(store, rank, world_size, seconds=seconds)
    except RuntimeError as error:
        store.set(f"reduced/{rank}", f"failed: {str(error).splitlines()[0]}")
    else:
        store.set(f"reduced/{rank}", repr(took))


def _all_reduce(
    store: "Store", world_size: int, deadline: float
) -> tuple[float | None, str | None, set[int]]:
    """Its seconds, what went wrong, and the ranks that said nothing."""
    took, trouble = None, None
    try:
        took = time_all_reduce(store, 0, world_size, seconds=max(1.0, deadline - time.monotonic()))
    except RuntimeError as error:
        trouble = str(error).splitlines()[0]
    silent = set()
    for rank in range(1, world_size):
        if not _wait_for(store, f"reduced/{rank}", deadline):
            silent.add(rank)
        elif (said := store.get(f"reduced/{rank}").decode()).startswith("failed"):
            trouble = trouble or f"rank {rank} {said}"
    return took, trouble, silent


def time_all_reduce(store: "Store", rank: int, world_size: int, *, seconds: float) -> float:
    """Median seconds of an all-reduce of ALL_REDUCE_MB over all tasks.

    Raises:
        RuntimeError: it failed, or took longer than `seconds`, or its sum is wrong.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    numbers = torch.ones(ALL_REDUCE_MB * 2**18, device=device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        dist.all_reduce(
            numbers, op=dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.MAX
        )
        total = float(numbers[-1])  # waits for the device
        times.append(time.perf_counter() - start)
        if total != 1.0:
            raise RuntimeError(f"an all-reduce of ones gives {total}")
    dist.destroy_process_group()
    return sorted(times)[REPEATS // 2]


def _let_others_leave(store: "Store", world_size: int) -> None:
    """The store ends with this process: those that still answer take leave of it first."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while store.add("left", 0) < world_size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)


def _wait_for(store: "Store", key: str, deadline: float) -> bool:
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _show(
    names: Sequence[str],
    reports: Mapping[str, Mapping[str, Any]],
    problems: Mapping[str, Sequence[str]],
    took: float | None,
    trouble: str | None,
) -> None:
    lines = []
    for name in names:
        report = reports.get(name, {})
        facts = (
            [f"{report['devices']} GPUs", f"{report['memory_gb']:.0f} GB memory"] if report else []
        )
        if "disk_gb" in report:
            facts.append(f"{report['disk_gb']:.0f} GB disk")
        if "skew" in report:
            facts.append(f"clock {report['skew']:+.3f} s")
        verdict = "BAD: " + "; ".join(problems[name]) if name in problems else "good"
        lines.append(f"health: {name}: {', '.join([*facts, verdict])}")
    if trouble:
        lines.append(f"health: the all-reduce failed: {trouble}")
    elif took is not None:
        lines.append(
            f"health: all-reduce of {ALL_REDUCE_MB} MiB over {os.environ['WORLD_SIZE']} tasks: "
            f"{took:.3f} s"
        )
    print("\n".join(lines), file=sys.stderr, flush=True)


def main() -> int:
    """The command of slurm/launch.sh."""
    parser = make_parser(
        "python -m sedd_scale.cluster.health",
        "Check the nodes of a Slurm step.",
        "srun python -m sedd_scale.cluster.health --folder runs/a/slurm",
    )
    parser.add_argument("--folder", type=given_path, required=True, help="of the run, on all nodes")
    for flag, variable, default, meaning in (
        ("--min-memory-gb", "SEDD_MIN_MEMORY_GB", "1", "that a node must have available"),
        ("--min-disk-gb", "SEDD_MIN_DISK_GB", "5", "that must be free where results go"),
        ("--max-skew", "SEDD_MAX_SKEW", "2", "seconds that the clocks of two nodes may differ"),
        ("--seconds", "SEDD_HEALTH_SECONDS", "180", "for the check of all nodes"),
    ):
        given = os.environ.get(variable) or default
        parser.add_argument(flag, type=float, default=given, help=f"{meaning} ({variable})")
    return run_command(parser, health_command)


if __name__ == "__main__":
    sys.exit(main())
