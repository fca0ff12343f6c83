"""One run on four processes, then on two of them, then on four again.

    RANK=.. WORLD_SIZE=4 MASTER_ADDR=.. MASTER_PORT=.. python elastic_worker.py FOLDER DATASET

The processes leave their group and form the next one as if newly launched, since their imports cost
more than their work.
"""

import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module=r"megatron\.")

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from sedd_scale.config import load_config  # noqa: E402
from sedd_scale.parallel.layout import leave_layout, shutdown  # noqa: E402
from sedd_scale.training.loop import train  # noqa: E402
from tests.repository import ROOT  # noqa: E402
from tests.training.live_run import SMALL, free_port  # noqa: E402

# Processes, and the step up to which they train.
LEGS = ((4, 4), (2, 8), (4, 12))


def form_group(num_processes: int, port: int) -> None:
    """Leave the group; the next one is of the first `num_processes`."""
    shutdown()
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    os.environ["MASTER_PORT"], os.environ["WORLD_SIZE"] = str(port), str(num_processes)


def main() -> None:
    folder, dataset = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    overrides = (*SMALL, f"data.path={dataset}", "parallel.zero_stage=2", "checkpoint.every=100")

    def go_on(name: str, steps: int) -> None:
        config = load_config(
            ROOT / "configs/runs/tiny.yaml", [*overrides, f"training.steps={steps}"]
        )
        train(config, folder / name)
        leave_layout()

    go_on("steady", LEGS[-1][1])
    go_on("changing", LEGS[0][1])
    ports = [free_port() for _ in LEGS]
    dist.broadcast_object_list(ports)
    for (num_processes, steps), port in zip(LEGS[1:], ports[1:], strict=True):
        form_group(num_processes, port)
        if int(os.environ["RANK"]) < num_processes:
            go_on("changing", steps)
    shutdown()


if __name__ == "__main__":
    main()
