"""One job at a time in a run directory.

Two jobs that went on with one run would each drop the other's metrics and replace its checkpoints.
The first process of a job therefore holds a POSIX record lock on RUN_DIR/lock, which also says who
that is. The kernel lets go of it however the process ends, forked children do not hold it, and NFS,
and Lustre mounted with `flock`, carry it from node to node. The file stays when the job has ended.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from sedd_scale.errors import ConfigError
from sedd_scale.parallel.layout import Layout
from sedd_scale.training.agreement import raise_together

LOCK_FILE = "lock"

# Seconds for a job that was just ended to let go.
PATIENCE = 5.0

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


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
        error = None
        if layout.rank == 0:
            try:
                self._stream = lock_run(run_dir)
            except ConfigError as refused:
                error = refused
        raise_together(error)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()


def lock_run(run_dir: Path, *, option: str = "--run-dir", patience: float = PATIENCE) -> IO[str]:
    """The directory's lock file, locked until it is closed; see `RunLock`.

    Args:
        option: of the command, by which the directory was given.
        patience: seconds to wait for a lock that is held.
    """
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise ConfigError(f"{option} {run_dir} cannot be written: {error.strerror}") from error
    deadline = time.monotonic() + patience
    while not _taken(stream):
        if time.monotonic() < deadline:
            time.sleep(0.2)
            continue
        holder = _read(stream)
        if _left_behind(holder):
            print(
                f"{path}: {_named(holder)} was of this job and is lost: going on", file=sys.stderr
            )
            return stream
        stream.close()
        raise ConfigError(
            f"{run_dir} is in use: {_named(holder)} trains in it; wait for its end, or give "
            f"another {option} (where that node is lost for good, remove {path})"
        )
    stream.truncate(0)
    json.dump(_this_process(), stream)
    stream.flush()
    return stream


def _taken(stream: IO[str]) -> bool:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _WITHOUT_LOCKS
    return True


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _left_behind(holder: dict[str, Any]) -> bool:
    """Whether the lock is of another node in this very job, which Slurm starts once at a time."""
    job = os.environ.get("SLURM_JOB_ID")
    return (
        job is not None
        and holder.get("slurm_job") == job
        and holder.get("host") != socket.gethostname()
    )


def _read(stream: IO[str]) -> dict[str, Any]:
    stream.seek(0)
    try:
        return dict(json.loads(stream.read()))
    except (ValueError, TypeError):  # just being written
        return {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = "" if holder.get("slurm_job") is None else f" of Slurm job {holder['slurm_job']}"
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']},"
