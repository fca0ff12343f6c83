"""How many rows are worked on at a time: what a cache holds on a CPU, what fills a GPU."""

import torch

# On a GPU few rows leave it idle, and the host waits once for every chunk.
GPU_BYTES = 2**30
_LEAST = 16


def rows_per_chunk(device: torch.device, *, row_bytes: int, cpu_bytes: int) -> int:
    """Rows of `row_bytes` each that are worked on at a time.

    Args:
        cpu_bytes: memory for them on a CPU.
    """
    budget = cpu_bytes if device.type == "cpu" else GPU_BYTES
    return max(_LEAST, budget // row_bytes)
