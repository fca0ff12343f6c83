"""Convert models of several depths and tell the peak memory of each conversion.

    python conversion_memory_worker.py FOLDER LAYERS...

Prints a JSON list of {"layers", "conversion", "peak_bytes"}: how far the resident memory of the
process rose above what it had before the conversion.
"""

import gc
import json
import shutil
import sys
from pathlib import Path

import torch

from sedd_scale.config import config_from_dict
from sedd_scale.interop.checkpoint_source import CheckpointSource, Description, Shape
from sedd_scale.interop.convert import convert
from sedd_scale.interop.native import write_native_run
from sedd_scale.planning.model_states import STATE_KEYS


class DrawnSource(CheckpointSource):
    """A trained run that is nowhere: each tensor is drawn when it is asked for."""

    format = "drawn"

    def __init__(self, num_layers: int) -> None:
        self.path = Path()
        self.holds = frozenset(STATE_KEYS)
        model = {
            "hidden_size": 192,
            "num_layers": num_layers,
            "num_heads": 4,
            "cond_dim": 16,
            "vocab_size": 900,
        }
        config = config_from_dict({"model": model, "data": {"block_length": 64}})
        self.described = Description(config, block_length=64, step=1, optimizer_step=1)

    def _read(self, name: str, key: str) -> torch.Tensor:
        return torch.rand(self.shapes[name])

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        return []


def resident_bytes(which: str) -> int:
    """VmRSS, what the process has now, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return 1024 * int(line.split()[1])
    raise LookupError(which)


def measured(folder: Path, num_layers: int) -> list[dict[str, object]]:
    write_native_run(DrawnSource(num_layers), folder / "native")
    rows = []
    for name, arguments in (
        ("native to sedd-hf", ("native", "sedd-hf", folder / "native", folder / "hf")),
        ("native to sedd-train", ("native", "sedd-train", folder / "native", folder / "c.pth")),
        ("sedd-hf to native", ("sedd-hf", "native", folder / "hf", folder / "from hf")),
        ("sedd-train to native", ("sedd-train", "native", folder / "c.pth", folder / "from c")),
    ):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident_bytes("VmRSS")
        convert(*arguments)
        peak = resident_bytes("VmHWM") - before
        rows.append({"layers": num_layers, "conversion": name, "peak_bytes": peak})
    return rows


if __name__ == "__main__":
    found = []
    for depth in [2, *map(int, sys.argv[2:])]:  # the first warms up
        of_depth = Path(sys.argv[1]) / f"{depth}"
        of_depth.mkdir()
        found += measured(of_depth, depth)
        shutil.rmtree(of_depth)
    print(json.dumps(found[4:]))
