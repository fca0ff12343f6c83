"""torchrun for one node of a Slurm step, which outlives the signals meant for its workers.

    srun --ntasks-per-node=1 python -m sedd_scale.cluster.node_agent --nproc-per-node=8 \\
        sedd-scale train ...

Slurm sends a signal to every process of a step. torchrun itself would die of SIGUSR1, and at
SIGTERM kill its workers after 30 seconds, in the middle of their save. It also ends with 1 whatever
a worker's code was; this ends with the code of the worker that failed first.
"""

import os
import signal
import sys
from collections.abc import Sequence

from sedd_scale.files.task_environment import set_rendezvous


def main(argv: Sequence[str] | None = None) -> int:
    """Run torchrun's agent with more arguments; its exit code."""
    # Handlers of ours, not SIG_IGN: workers, and what they start, do not inherit those.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT"

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    environment = os.environ
    set_rendezvous(environment)
    arguments = [
        f"--nnodes={environment['SLURM_STEP_NUM_NODES']}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
        "--max-restarts=0",
        *(sys.argv[1:] if argv is None else argv),
    ]
    try:
        run.main(arguments)
    except ChildFailedError as error:
        code: int = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    return 0


if __name__ == "__main__":
    sys.exit(main())
