"""The place of a process started by `srun`, in the variables that torch's launcher would set.

`srun sedd-scale train ...` starts one process a task and says where each stands in SLURM_*
variables only. Every command calls `adopt_slurm_task` first, so that the rest of the package knows
one set of names: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import re
from collections.abc import MutableMapping

from sedd_scale.errors import ConfigError

# Below the range that systems hand out to outgoing connections (32768 on).
FIRST_PORT, NUM_PORTS = 15000, 16000


def adopt_slurm_task(environment: MutableMapping[str, str]) -> bool:
    """Fill in the launcher's variables of a task of a Slurm step; whether it was done.

    Nothing changes outside a step (a batch script's own shell runs outside of one), in a step of
    one task, or where a launcher such as torchrun has set RANK or WORLD_SIZE. MASTER_ADDR and
    MASTER_PORT that are set stay; else they are the step's first node and a port made of the job's
    and the step's numbers, so that two steps on a node do not meet.

    Raises:
        ConfigError: a variable of the step is missing or no number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return False
    if _number(environment, "SLURM_STEP_NUM_TASKS", default=1) < 2:
        return False
    local_rank = _number(environment, "SLURM_LOCALID")
    tasks_on_nodes = expand_counts(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    node = _number(environment, "SLURM_NODEID", default=0)
    if node >= len(tasks_on_nodes):
        raise ConfigError(
            f"SLURM_NODEID={node} is not one of the {len(tasks_on_nodes)} nodes of "
            "SLURM_STEP_TASKS_PER_NODE: start the command by srun"
        )
    if sees_own_gpu_only(environment, tasks_on_nodes[node]):
        local_rank = 0
    set_rendezvous(environment)
    environment.update(
        RANK=str(_number(environment, "SLURM_PROCID")),
        WORLD_SIZE=str(_number(environment, "SLURM_STEP_NUM_TASKS")),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(tasks_on_nodes[node]),
    )
    return True


def set_rendezvous(environment: MutableMapping[str, str]) -> None:
    """Where the processes of a step meet, MASTER_ADDR and MASTER_PORT, unless they are set.

    Raises:
        ConfigError: a variable of the step is missing or no number.
    """
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    environment.setdefault("MASTER_ADDR", first_host(_text(environment, "SLURM_STEP_NODELIST")))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + (16 * job + step) % NUM_PORTS))


def sees_own_gpu_only(environment: MutableMapping[str, str], tasks_on_node: int) -> bool:
    """Whether Slurm shows each task of this node one GPU (--gpus-per-task=1, --gpu-bind=single:1).

    Its number within the process is then 0, whatever the task's number.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return tasks_on_node > 1 and len(visible.split(",")) == 1 and visible != ""


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: gpu[003-010,12],big1 -> gpu003."""
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if name is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no node: start the command by srun")
    return re.sub(r"\[([^,\]-]*)[^\]]*\]", r"\1", name[0])


def expand_counts(counts: str) -> list[int]:
    """Tasks of each node, from Slurm's short form: 4(x2),1 -> [4, 4, 1]."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE={counts!r} is no list of counts such as 4(x2),1"
            )
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded


def _text(environment: MutableMapping[str, str], name: str) -> str:
    value = environment.get(name)
    if not value:
        raise ConfigError(
            f"{name} is not set in a Slurm step of several tasks: start the command by srun, or "
            "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return value


def _number(environment: MutableMapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    value = _text(environment, name)
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} is no number: start the command by srun")
    return int(value)
