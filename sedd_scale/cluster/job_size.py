"""How large a training job is: nodes, tasks, memory and time, from the layout and the plan."""

import math
from dataclasses import dataclass

from sedd_scale.errors import ConfigError
from sedd_scale.planning.layouts import Plan

GB = 1e9
# Of one process: Python, torch, its CUDA context and pinned buffers, the loader.
PROCESS_GB = 8.0
# A save in the background copies weights, both moments and the average to host memory, in float32.
SAVED_BYTES = 16
# What is asked for over the estimate, and for imports, validations, saves and a resume.
TIME_MARGIN, TIME_EXTRA = 1.2, 1800.0


@dataclass(frozen=True)
class JobSize:
    """What a job asks of Slurm.

    Attributes:
        memory_gb: host memory of one node.
        seconds: of one start: the whole run, or the longest that is allowed.
        starts: how many starts the run takes by the estimate.
        run_seconds: of the whole run by the estimate, with its margin.
    """

    nodes: int
    tasks_per_node: int
    memory_gb: int
    seconds: int
    starts: int
    run_seconds: float

    @property
    def tasks(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks_per_node


def job_size(
    planned: Plan,
    *,
    tasks_per_node: int,
    run_seconds: float,
    longest_seconds: float,
    on_cpu: bool = False,
) -> JobSize:
    """The job of a plan.

    Args:
        planned: `planning.layouts.plan` of the configuration on its number of processes.
        tasks_per_node: processes that one node has room for.
        run_seconds: estimate of the whole run's steps.
        longest_seconds: the time limit that one start may have.
        on_cpu: weights and activations are in the nodes' memory too.

    Raises:
        ConfigError: processes do not spread evenly, or a tensor-parallel group leaves its node.
    """
    tasks = planned.gpus
    nodes = math.ceil(tasks / tasks_per_node)
    if tasks % nodes:
        raise ConfigError(
            f"--gpus {tasks} do not spread evenly over {nodes} nodes: give a multiple of "
            f"{tasks_per_node}, or another --gpus-per-node"
        )
    on_node, tensor = tasks // nodes, planned.parallel.tensor
    if on_node % tensor:
        raise ConfigError(
            f"parallel.tensor={tensor} does not divide the {on_node} processes of a node, and its "
            "groups would leave their nodes: change it, --gpus or --gpus-per-node"
        )
    # The checkpoint's copies are spread over all processes; a stage's are on the nodes it is on.
    heaviest = max(stage.parameters for stage in planned.stages)
    memory = on_node * (PROCESS_GB * GB + SAVED_BYTES * heaviest / planned.data)
    if on_cpu:
        memory += on_node * planned.heaviest.peak
    wanted = TIME_MARGIN * run_seconds + TIME_EXTRA
    useful = longest_seconds - TIME_EXTRA
    if useful <= 0:
        raise ConfigError(
            f"--longest {longest_seconds / 3600:g} hours leave no time to train: give more than "
            f"{TIME_EXTRA / 3600:g}"
        )
    starts = max(1, math.ceil(TIME_MARGIN * run_seconds / useful))
    return JobSize(
        nodes=nodes,
        tasks_per_node=on_node,
        memory_gb=math.ceil(memory / GB),
        seconds=math.ceil(min(wanted, longest_seconds) / 60) * 60,
        starts=starts,
        run_seconds=wanted,
    )
