"""What a node can say of itself before work begins: devices, memory, disk, the run's folder."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_scale.files.task_environment import sees_own_gpu_only

GB = 1e9
# Of a GPU's memory; what is missing is another process's, or one that was not ended.
MIN_FREE_SHARE = 0.9


@dataclass(frozen=True)
class Limits:
    """What a node has to have.

    Attributes:
        memory_gb: memory available to new processes.
        disk_gb: disk free in the run's folder.
        skew: seconds by which its clock may differ from the first node's.
    """

    memory_gb: float
    disk_gb: float
    skew: float


def examine_node(folder: Path, environment: MutableMapping[str, str]) -> dict[str, Any]:
    """Measure this node; a plain dictionary, with an `error` where the folder cannot be used.

    Args:
        folder: of the run; a small file is written, read back and removed.
        environment: of a task of this node's.
    """
    report: dict[str, Any] = {
        "devices_expected": expected_devices(environment),
        **examine_devices(),
        "memory_gb": available_memory() / GB,
    }
    try:
        report["disk_gb"] = shutil.disk_usage(folder).free / GB
        write_and_read(folder)
    except OSError as error:
        report["error"] = f"cannot use {folder}: {error.strerror or error}"
    return report


def expected_devices(environment: MutableMapping[str, str]) -> int:
    """GPUs that a process of this node's should see, as Slurm allotted them."""
    tasks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if sees_own_gpu_only(environment, tasks):
        return 1
    return int(environment.get("SLURM_GPUS_ON_NODE", "0"))


def examine_devices() -> dict[str, Any]:
    """GPUs that are there and answer: their number and the least free share of their memory."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free_share = 1.0
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
            answer = torch.ones(256, 256, device=f"cuda:{index}").square().sum().item()
        except RuntimeError as error:
            return {"devices": count, "device_error": f"GPU {index}: {str(error).splitlines()[0]}"}
        if answer != 256 * 256:
            return {"devices": count, "device_error": f"GPU {index} computes 65536 as {answer}"}
        free_share = min(free_share, free / total)
    return {"devices": count, "device_free_share": free_share}


def available_memory() -> int:
    """Bytes of memory that new processes of this node can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(value.split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def write_and_read(folder: Path) -> None:
    """Write a file, put it on disk, read it back and remove it; raises OSError."""
    content = secrets.token_bytes(4096)
    descriptor, name = tempfile.mkstemp(prefix=".health-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            raise OSError("a file does not read back as it was written")
    finally:
        path.unlink()


def problems_of(report: Mapping[str, Any], limits: Limits) -> list[str]:
    """What is wrong with a node, by its report; nothing for a good one."""
    problems = []
    if report["devices"] < report["devices_expected"]:
        problems.append(f"{report['devices']} of {report['devices_expected']} GPUs answer")
    if "device_error" in report:
        problems.append(report["device_error"])
    elif report["device_free_share"] < MIN_FREE_SHARE:
        problems.append(
            f"only {report['device_free_share']:.0%} of a GPU's memory is free: another process "
            "holds the rest"
        )
    if report["memory_gb"] < limits.memory_gb:
        problems.append(f"{report['memory_gb']:.1f} GB of memory, not {limits.memory_gb:g}")
    if "error" in report:
        problems.append(report["error"])
    elif report["disk_gb"] < limits.disk_gb:
        problems.append(f"{report['disk_gb']:.1f} GB of disk free, not {limits.disk_gb:g}")
    if not report.get("same_folder", True):
        problems.append("does not see the files that the first node writes")
    if abs(report.get("skew", 0.0)) > limits.skew + report.get("skew_error", 0.0):
        problems.append(f"its clock is {report['skew']:+.1f} s off the first node's")
    return problems
