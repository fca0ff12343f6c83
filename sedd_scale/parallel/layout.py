"""Where this process stands: tensor x pipeline x data coordinates, groups and device.

Ranks are ordered as Megatron-core and DeepSpeed order them: tensor fastest, then data, then
pipeline.
"""

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from sedd_scale.config import ParallelConfig
from sedd_scale.errors import ConfigError
from sedd_scale.files.compiler import compiler_fault, compiles_kernels

DEVICES = Path("/dev")


@dataclass(frozen=True)
class Layout:
    """This process's place in the tensor x pipeline x data grid.

    Sizes count processes; each rank counts from 0 within its axis.
    """

    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    rank: int
    device: torch.device
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return self.tensor * self.pipeline * self.data

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the head and computes the loss."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def counts_loss(self) -> bool:
        """Whether this process's loss counts: the tensor ranks of a last stage have the same."""
        return self.is_last_stage and self.tensor_rank == 0

    def owns_copy(self, *, split: bool) -> bool:
        """Whether it speaks for a tensor: of one that is not split, tensor ranks hold copies."""
        return split or self.tensor_rank == 0

    def first_position(self, length: int) -> int:
        """Where in the sequence its first position lies, of `length` that it holds."""
        return length * self.tensor_rank if self.sequence_parallel else 0

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The processes that share every matrix of this stage."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The processes that hold the same shard and see other samples."""
        return parallel_state.get_data_parallel_group()


def launched_world_size() -> int:
    """Number of processes the launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU where there is none.

    Raises:
        ConfigError: more processes on this node than it has GPUs; GPUs that torch cannot use; no
            compiler for the kernels.
    """
    if not torch.cuda.is_available():
        fault = _why_gpus_are_not_used()
        if fault is not None:
            raise ConfigError(f"this node has a GPU that torch cannot use: {fault}")
        return torch.device("cpu")
    fault = compiler_fault() if compiles_kernels() else None
    if fault is not None:
        raise ConfigError(f"kernels cannot be compiled here: {fault}")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this node has "
            f"{torch.cuda.device_count()}; start at most that many processes on it"
        )
    return torch.device("cuda", local_rank)


def _why_gpus_are_not_used() -> str | None:
    """What torch says, such as that the driver is too old; None: there are no GPUs for it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or not list(DEVICES.glob("nvidia[0-9]*")):
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "it finds none"


def initialize_layout(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    timeout_seconds: float = 2400.0,
) -> Layout:
    """Start the process group and Megatron-core's groups; every process calls this once.

    Without a launcher's environment a group of one process is made, with no port opened.

    Args:
        timeout_seconds: a collective that takes longer ends the process. With NCCL that is an
            abort without a word of ours: give more than a watchdog of one's own waits.

    Raises:
        ConfigError: the number of processes is not a multiple of tensor x pipeline, or one of
            these is below 1.
    """
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    for name, size in parallel.axes.items():
        if size < 1:
            raise ConfigError(
                f"parallel.{name}={size} processes cannot share a model: give at least 1"
            )
    device = local_device()
    parallel.replicas(launched_world_size())
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_seconds)
        # With its device known NCCL connects at once and splits its groups off this one.
        device_id = None
        if device.type == "cuda":
            torch.cuda.set_device(device)
            device_id = device
        if "WORLD_SIZE" in os.environ:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            # torchrun keeps its store when it restarts the ranks, with the addresses of the former.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt-{attempt}", store)
        else:
            store, rank, size = dist.HashStore(), 0, 1
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device_id,
        )
    if device.type == "cpu":
        _answer_current_device_with_cpu()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    return Layout(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        rank=dist.get_rank(),
        device=device,
        sequence_parallel=sequence_parallel,
    )


def leave_layout() -> None:
    """End the layout's groups, so that another can follow among the same processes.

    Megatron-core only forgets them, and each keeps its threads.
    """
    if not parallel_state.is_initialized():
        return
    groups = {
        group for group in vars(parallel_state).values() if isinstance(group, dist.ProcessGroup)
    }
    dist.barrier()  # no process may still be within a collective of a group that ends
    for group in groups - {dist.group.WORLD}:
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave all process groups, so that a launcher sees a clean end."""
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()


def _answer_current_device_with_cpu() -> None:
    """Several of Megatron-core's functions ask CUDA for a device; without a GPU that is the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


class ModelParallelUnit:
    """Megatron-core's `parallel_state` under the older names DeepSpeed asks its `mpu` for."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(
            parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel")
        )
