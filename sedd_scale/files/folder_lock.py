"""One job at a time in a folder.

Two jobs that wrote into one folder would replace each other's files. A job's first process
therefore holds a POSIX record lock on a file in it, which also says who that is. The kernel lets go
of it however the process ends, forked children do not hold it, and NFS, and Lustre mounted with
`flock`, carry it from node to node.
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
from sedd_scale.version import now

LOCK_FILE = "lock"

PATIENCE = 5.0

# What the kernel says of locks on a file system without them.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def lock_folder(
    folder: Path, *, option: str, name: str = LOCK_FILE, patience: float = PATIENCE
) -> IO[str]:
    """The folder's lock file, locked until it is closed.

    On a file system without locks it keeps nobody out. A lock that a lost node left behind does not
    stop the same Slurm job's next start.

    Args:
        folder: made if it is not there.
        option: of the command, by which the folder was given.
        name: of the lock file, which stays.
        patience: seconds for a job that was just ended to let go.

    Raises:
        ConfigError: another process has it, or it cannot be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be written: {error.strerror}") from error
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
            f"{folder} is in use: {_named(holder)} works in it; wait for its end, or give "
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
        return error.errno in WITHOUT_LOCKS
    return True


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": now(),
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
