"""Kill the processes of a run while they save, again and again, and resume after every kill.

    PYTHONPATH=. python tests/checkpoint/torture.py --rounds 500

Two processes that share a small state save it at step after step, in the background, as training
does. In every round one of them, or both, get SIGKILL: at one of the named points of a save, or at
a random moment. Then the directory must hold a good checkpoint (once one was published), its
content must be that of its step, and the next round goes on from there. Every fourth round also
damages the newest checkpoint: a bit flipped, a file cut short, a file deleted.

The processes are forked from one that has imported everything and started no thread.
"""

import argparse
import datetime
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sedd_scale.checkpoint import fault_points
from sedd_scale.checkpoint.reading import load_newest
from sedd_scale.checkpoint.writer import CheckpointWriter
from sedd_scale.config.sections import CheckpointConfig
from sedd_scale.errors import CheckpointError
from sedd_scale.parallel.layout import Layout
from tests.checkpoint.stand_in_state import StandInState, meta_of

RANKS, SHAPE, KEEP = 2, (64, 65), 2
MOST_STEPS = 6
OF_RANK_0 = ("before rename", "between rename and latest", "within removal")


def train(rank: int, port: int, run_dir: Path, orders: dict[str, Any]) -> int:
    """One process of a run: resume, check what was loaded, save until killed; the exit code."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, rank == 0, datetime.timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    layout = Layout(1, 1, RANKS, 0, 0, rank, rank, torch.device("cpu"))
    state: Any = StandInState(SHAPE, layout)
    if orders["expects"]:
        _, meta = load_newest(run_dir, state)
        if meta["step"] != state.step or not state.is_of(state.step):
            (run_dir / "torn").write_text(f"step {meta['step']}\n")
            return 9
        if rank == 0:
            (run_dir / "resumed").write_text(str(state.step))
    if orders["rank"] in (rank, "all"):
        left = orders["passes"]

        def die() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                if orders["rank"] == "all":
                    os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

        if orders["point"] is not None:
            fault_points.at(orders["point"], die)
    with CheckpointWriter(run_dir, state, config=CheckpointConfig(keep=KEEP)) as writer:
        for _ in range(MOST_STEPS):
            state.fill(state.step + 1)
            writer.poll()
            step = state.step
            writer.save(meta_of(step))
    return 0


def fork_run(run_dir: Path, orders: dict[str, Any], log: Path) -> list[int]:
    """Start the processes of a run, all in one process group of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, pids[0] if pids else 0)
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                code = train(rank, port, run_dir, orders)
            except CheckpointError as error:
                (run_dir / "refused").write_text(str(error))
                code = 2
            except Exception as error:  # a peer's death, in whatever words
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def reap(pids: list[int], seconds: float) -> list[int | None]:
    """Wait for the processes, at most so long, and kill what is left; exit codes, None if left."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        # As a launcher does: one that is gone takes the others with it.
        if codes and len(codes) < len(pids):
            deadline = min(deadline, time.monotonic() + 0.5)
        if time.monotonic() > deadline:
            break
        time.sleep(0.002)
    left = [pid for pid in pids if pid not in codes]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


def damage(folder: Path, draw: random.Random) -> str | None:
    """Damage one file of the newest checkpoint, if an older one is there to fall back on."""
    steps = sorted(
        (path for path in folder.glob("step-*") if path.suffix == ""),
        key=lambda path: int(path.name.removeprefix("step-")),
    )
    named = folder / "latest"
    if len(steps) < 2 or not named.exists():
        return None
    newest = folder / named.read_text().strip()
    if not newest.is_dir() or steps[0] == newest:
        return None
    path = draw.choice([named, *sorted(p for p in newest.rglob("*") if p.is_file())])
    how = draw.choice(["flipped", "cut", "deleted"])
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return f"{path.name} {how}"


def latest_step(checkpoints: Path) -> int:
    """What `latest` names; 0 where it does not."""
    try:
        text = (checkpoints / "latest").read_text(errors="replace").strip()
    except FileNotFoundError:
        return 0
    return int(text[5:]) if text[:5] == "step-" and text[5:].isdigit() else 0


def torture(rounds: int, seed: int, folder: Path) -> Counter[str]:
    """Play the rounds; counts of what happened. Raises AssertionError at the first broken law."""
    draw, counts = random.Random(seed), Counter[str]()
    run_dir = folder / "run"
    run_dir.mkdir()
    checkpoints = run_dir / "checkpoints"
    floor = 0
    for number in range(1, rounds + 1):
        expects = any(p.suffix == "" for p in checkpoints.glob("step-*"))
        point = draw.choice([*fault_points.POINTS, None, None, None])
        orders = {
            "expects": expects,
            "rank": draw.choice([0, "all"] if point in OF_RANK_0 else [*range(RANKS), "all"]),
            "point": point,
            "passes": draw.randrange(3),
        }
        before, begun = latest_step(checkpoints), time.monotonic()
        log = folder / "log"
        log.unlink(missing_ok=True)
        for name in ("resumed", "refused", "torn"):
            (run_dir / name).unlink(missing_ok=True)
        pids = fork_run(run_dir, orders, log)
        if point is None:
            time.sleep(draw.uniform(0.05, 0.8))
            victims = pids if orders["rank"] == "all" else [pids[orders["rank"]]]
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
        codes = reap(pids, 30.0)
        output = log.read_text() if log.exists() else ""
        assert not (run_dir / "torn").exists(), (number, orders, output)
        assert not (run_dir / "refused").exists() or not expects, (
            number,
            (run_dir / "refused").read_text(),
        )
        resumed = None
        if (run_dir / "resumed").exists():
            resumed = int((run_dir / "resumed").read_text())
            counts["resumed"] += 1
            assert resumed >= floor, (number, resumed, floor)
        found = latest_step(checkpoints)
        if found != before:  # one was published
            floor = found
        elif resumed is not None:
            floor = resumed
        killed = [code for code in codes if code == -signal.SIGKILL]
        counts["killed"] += bool(killed)
        counts[point or "random moment"] += bool(killed)
        damaged = damage(checkpoints, draw) if number % 4 == 0 else None
        if damaged:
            counts["damaged"] += 1
            floor = 0
        print(
            f"round {number}: {point or 'random moment'}, rank {orders['rank']}: exit codes "
            f"{codes}; resumed from {resumed}, latest {found or '-'}"
            f"{f'; then {damaged}' if damaged else ''} ({time.monotonic() - begun:.1f} s)",
            flush=True,
        )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = torture(arguments.rounds, arguments.seed, Path(folder))
    print(
        f"{arguments.rounds} rounds in {time.monotonic() - begun:.0f} s, no checkpoint lost or "
        f"torn: {json.dumps(dict(sorted(counts.items())))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
