"""One process on a GPU: its group takes no tensor of the host, so that a save may not ask it."""

import subprocess
import sys
from pathlib import Path

from tests.repository import ROOT

# Its default group serves tensors on a GPU alone, as NCCL's does.
PROGRAM = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from sedd_scale.checkpoint.writer import CheckpointWriter
from sedd_scale.config import CheckpointConfig
from sedd_scale.parallel.agreement import from_first, gathered
from sedd_scale.parallel.layout import Layout
from tests.checkpoint.stand_in_state import StandInState, meta_of

dist.init_process_group("cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
try:
    dist.all_reduce(torch.zeros(1))
except RuntimeError as error:
    assert "No backend type associated with device type cpu" in str(error), error
else:
    raise SystemExit("the group takes tensors of the host")
layout = Layout(1, 1, 1, 0, 0, 0, 0, torch.device("cpu"))
state = StandInState((4, 6), layout)
for asynchronous in (True, False):
    config = CheckpointConfig(async_save=asynchronous)
    with CheckpointWriter(Path(sys.argv[1]), state, config=config) as writer:
        state.step += 1
        writer.save(meta_of(state.step))
        writer.poll()
assert gathered(1) == [1] and from_first(lambda: 2) == 2
print((Path(sys.argv[1]) / "checkpoints/latest").read_text().strip())
"""


def test_one_process_saves_without_a_collective(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "step-2\n"
