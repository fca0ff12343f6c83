"""How much of the machine a run uses: its share of the device's peak, and memory."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from sedd_scale.config import Config
from sedd_scale.planning.flops import PEAK_FLOPS, step_flops

_REPEATS = 3
_LONG_ENOUGH = 0.02


class Peak(NamedTuple):
    """FLOP/s that a device can reach in matrix products of the run's precision."""

    flops_per_second: float
    name: str
    """Where it is from: the maker's data sheet, or a measurement."""


class Utilisation:
    """Model FLOPs utilisation and memory of this process.

    Made by one process alone, as its peak may have to be measured: some tenths of a second.

    Args:
        config: one that is fitted to its dataset.
        world_size: processes of the run.

    Attributes:
        peak: of this process's device.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int) -> None:
        assert config.model.vocab_size is not None and config.data.block_length is not None
        flops = step_flops(
            config, vocab_size=config.model.vocab_size, block_length=config.data.block_length
        )
        self._flops_of_process = flops.required / world_size
        self._device = device
        self.peak = peak_of(device, config.training.precision)
        self.memory_total_bytes = (
            torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        )

    def mfu(self, step_seconds: float) -> float:
        """Share of the peak, given the seconds of a step; recomputed activations do not count."""
        return self._flops_of_process / step_seconds / self.peak.flops_per_second

    def memory_bytes(self) -> int:
        """The most this process has held at once: of its GPU, or of main memory without one."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of(device: torch.device, precision: str) -> Peak:
    """From the data sheet where the device is known, else measured."""
    named = named_peak(device, precision)
    if named is not None:
        return Peak(named, f"{precision} peak")
    return Peak(measured_peak(device, precision), "measured peak")


def named_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s in the maker's data sheet for the matrix products of this device, if it is known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    if "h100" in words and "pcie" in words:
        return PEAK_FLOPS["h100-pcie"][precision]
    return next((PEAK_FLOPS[word][precision] for word in words if word in PEAK_FLOPS), None)


def measured_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest product of matrices, each twice the size of the one before.

    It ends with a size that takes long enough to be measured: tenths of a second in all, also where
    the device computes in `precision` by slow detours.
    """
    fastest = 0.0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        product, flops = matrix_product(device, precision, size=size)
        quickest = math.inf
        for _ in range(_REPEATS):
            start = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            quickest = min(quickest, time.perf_counter() - start)
        fastest = max(fastest, flops / quickest)
        if quickest > _LONG_ENOUGH:
            break
    return fastest


def matrix_product(
    device: torch.device, precision: str, *, size: int
) -> tuple[Callable[[], object], int]:
    """A product of square matrices and its floating-point operations; no random number is drawn."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    angles = torch.linspace(0.0, 1e4, size * size, device=device)
    left, right = angles.sin().to(dtype).view(size, size), angles.cos().to(dtype).view(size, size)
    output = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=output), 2 * size**3
