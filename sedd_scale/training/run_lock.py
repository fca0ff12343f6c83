"""One job at a time in a run directory.

Two jobs that went on with one run would each drop the other's metrics and replace its checkpoints.
"""

from pathlib import Path
from typing import IO

from sedd_scale.errors import ConfigError
from sedd_scale.files.folder_lock import lock_folder
from sedd_scale.parallel.agreement import together
from sedd_scale.parallel.layout import Layout


class RunLock:
    """Keeps other jobs out of the run directory until it is closed or this process ends.

    Collective over all processes: where the first one is refused, all are. On a file system without
    locks it keeps nobody out. A lock that a lost node left behind does not stop the same Slurm
    job's next start.

    Args:
        run_dir: made if it is not there.

    Raises:
        ConfigError: another process trains in the directory, or it cannot be written.
    """

    def __init__(self, run_dir: Path, layout: Layout) -> None:
        self._stream: IO[str] | None = None
        with together(ConfigError):
            if layout.rank == 0:
                self._stream = lock_folder(run_dir, option="--run-dir")

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
