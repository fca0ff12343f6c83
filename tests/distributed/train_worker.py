"""Train several runs, one after the other, in the processes of one launch.

    torchrun --nproc-per-node N train_worker.py JOBS.json

JOBS.json lists {"config": FILE, "run_dir": DIR, "overrides": [...]}: imports are paid for once.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module=r"megatron\.")

from sedd_scale.config import load_config  # noqa: E402
from sedd_scale.parallel.layout import leave_layout, shutdown  # noqa: E402
from sedd_scale.training.loop import train  # noqa: E402

for job in json.loads(Path(sys.argv[1]).read_text()):
    train(load_config(job["config"], job["overrides"]), Path(job["run_dir"]))
    leave_layout()
shutdown()
