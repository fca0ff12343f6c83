"""Time and memory of programs, measured side by side in one process."""

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def median_seconds(
    programs: Sequence[Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> list[float]:
    """Median seconds of each program over `repeats` rounds, after `warm_up` uncounted ones.

    A round runs every program once, so that a slow minute of the machine slows each of them.
    """
    seconds: list[list[float]] = [[] for _ in programs]
    for turn in range(warm_up + repeats):
        for times, program in zip(seconds, programs):
            _wait_for_device()
            start = time.perf_counter()
            program()
            _wait_for_device()
            if turn >= warm_up:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def peak_bytes(program: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator had handed out at once to `program`, run once.

    Bytes that were alive before do not count, and are to stay alive. On a GPU the allocator's own
    counter; on the CPU its record of every allocation, inside operators too (what a matrix library
    keeps for itself is not in it).
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        program()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it prints when it starts and stops
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        program()
    results = profiler.profiler.kineto_results
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
