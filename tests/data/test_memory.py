"""Memory of preparing and loading does not grow with the text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository import ROOT

# Prints the peak of this process's memory (MB) while preparing, then while an epoch is loaded.
PROGRAM = """
import re, sys
from pathlib import Path
from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.preparation.prepare import prepare

def peak():
    # Not getrusage: what it tells includes the process that this one was forked from.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024 / 1e6

output = Path(sys.argv[1]).parent / "out"
index = prepare([sys.argv[1]], output=output, block_length=256, tokenizer="bytes",
                blocks_per_shard=1000, processes=1)
prepared = peak()
config = Config().override(f"data.path={output}", "training.global_batch=64")
loader = Corpus(config.data).train_loader(config)
for step in range(index["splits"]["train"]["blocks"] // 64):
    loader.batch(step, range(64))
print(prepared, peak(), "torch" in sys.modules)
"""


def peaks(folder: Path, documents: int) -> tuple[float, float]:
    folder.mkdir()
    with (folder / "texts.jsonl").open("w") as lines:
        for number in range(documents):
            lines.write(json.dumps({"text": f"{number} {'river stone ' * 700}"}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "texts.jsonl")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    prepared, loaded, with_torch = done.stdout.split()
    assert with_torch == "False"
    return float(prepared), float(loaded)


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """60 MB of text against 20: far less more than the 40 MB, for buffers and the allocator."""
    small, large = peaks(tmp_path / "small", 2400), peaks(tmp_path / "large", 7200)
    with capsys.disabled():
        print(f"\npreparing and loading 20 MB: {small} MB, 60 MB: {large} MB")
    assert large[0] < small[0] + 16
    assert large[1] < small[1] + 16
    assert large[1] < 300
