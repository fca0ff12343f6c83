"""One save as its threads see it: what each rank writes, and how they meet without a process group.

A thread of every rank writes the rank's own file, fsyncs and hashes it, and leaves a note in the
directory; the thread of rank 0 waits for the notes of all ranks, writes the manifest, renames the
directory and lets `latest` name it. The threads talk through these files alone, never through a
process group, so they can neither disturb the training's collectives nor hang in one when a rank
dies.
"""

import pickle
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from sedd_scale.checkpoint import fault_points
from sedd_scale.checkpoint.boxes import BoxSavePlanner, LogicalTensor
from sedd_scale.checkpoint.directory import begin_checkpoint, publish_checkpoint
from sedd_scale.checkpoint.files import HashingWriter
from sedd_scale.checkpoint.manifest import FileRecord, write_manifest
from sedd_scale.config.sections import CheckpointConfig
from sedd_scale.files.atomic import write_atomically
from sedd_scale.parallel.layout import Layout

ATTEMPT = "attempt"
"""Written by rank 0 into the emptied directory: which save the other ranks may write to it."""

_LOOK_SECONDS = 0.01

RUNNING, DONE, FAILED = 0, 1, 2


@dataclass
class SavePlanOfRank:
    """What this rank writes and, on rank 0, the index of what all write; the same every time."""

    planner: BoxSavePlanner
    own: SavePlan
    index: Metadata | None


def make_plan(
    tensors: dict[str, LogicalTensor], layout: Layout, group: dist.ProcessGroup | None
) -> SavePlanOfRank:
    """torch's plan of a save; collective over all processes."""
    is_main = layout.rank == 0
    planner = BoxSavePlanner()
    planner.set_up_planner(tensors, None, is_main)
    of_ranks: list[Any] | None = [None] * layout.world_size if is_main else None
    own: list[Any] = [planner.create_local_plan()]
    if layout.world_size > 1:
        dist.gather_object(own[0], of_ranks, group=group)
    else:
        of_ranks = own
    plans: list[Any] = [None] * layout.world_size
    index = None
    if of_ranks is not None:
        plans, index = planner.create_global_plan(of_ranks)
        plans = HashingWriter(Path()).prepare_global_plan(plans)
    if layout.world_size > 1:
        dist.scatter_object_list(own, plans, group=group)
    else:
        own = plans
    return SavePlanOfRank(planner, planner.finish_plan(own[0]), index)


@dataclass(frozen=True, eq=False)
class SaveJob:
    """What one rank does of one save.

    Attributes:
        folder: the run's checkpoints/.
        attempt: names this save; ranks other than 0 wait for it in the directory.
        meta_text: the content of meta.json.
        tokenizer_directory: copied into the checkpoint.
    """

    folder: Path
    step: int
    attempt: str
    rank: int
    num_ranks: int
    plan: SavePlanOfRank
    tensors: dict[str, LogicalTensor]
    meta_text: str
    tokenizer_directory: Path | None
    config: CheckpointConfig


class RunningSave:
    """One rank's share of one save, in a thread of its own.

    Args:
        begun: when the save was asked for, by `time.perf_counter`.
    """

    def __init__(self, job: SaveJob, *, begun: float) -> None:
        self.step, self.begun, self.ended = job.step, begun, begun
        self.blocked_seconds = 0.0
        self.final = job.folder / f"step-{job.step}"
        self.temporary = job.folder / f"step-{job.step}.tmp"
        self.error: str | None = None
        self.cancel = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"save {job.step}", daemon=True)
        self._job = job

    def state(self) -> int:
        """Running, done or failed, as far as this rank knows."""
        if self.thread.is_alive():
            return RUNNING
        return DONE if self.error is None else FAILED

    def _run(self) -> None:
        writer = HashingWriter(self.temporary)
        try:
            self._write(writer)
        except _Cancelled:
            self.error = None  # that of another rank counts
        except Exception as error:  # whatever it is, the main thread has to know
            cause = writer.failure or error
            text = " ".join(str(cause).split())
            self.error = text if isinstance(cause, OSError) else f"{type(cause).__name__}: {text}"
        finally:
            self.ended = time.perf_counter()

    def _write(self, writer: HashingWriter) -> None:
        job = self._job
        if job.rank == 0:
            begin_checkpoint(job.folder, self.step)
            write_atomically(self.temporary / ATTEMPT, job.attempt.encode())
        else:
            self._wait_until(self._has_begun)
        fault_points.reach("before data")
        job.plan.planner.state_dict = job.tensors
        results = writer.write_data(job.plan.own, job.plan.planner).value()
        fault_points.reach("data written")
        write_atomically(self._note(job.rank), pickle.dumps((results, writer.records)))
        if job.rank == 0:
            self._wait_until(lambda: all(self._note(r).exists() for r in range(job.num_ranks)))
            self._publish(writer)

    def _publish(self, writer: HashingWriter) -> None:
        job = self._job
        results: list[Any] = []
        records: dict[str, FileRecord] = {}
        for rank in range(job.num_ranks):
            of_rank, written = pickle.loads(self._note(rank).read_bytes())
            results.append(of_rank)
            records |= written
            self._note(rank).unlink()
        (self.temporary / ATTEMPT).unlink()
        assert job.plan.index is not None
        writer.finish(job.plan.index, results)
        records |= writer.records
        (self.temporary / "meta.json").write_text(job.meta_text, encoding="utf-8")
        if job.tokenizer_directory is not None:
            shutil.copytree(job.tokenizer_directory, self.temporary / "tokenizer")
        write_manifest(self.temporary, records)
        publish_checkpoint(self.temporary, keep=job.config.keep, keep_every=job.config.keep_every)

    def _note(self, rank: int) -> Path:
        """The file by which a rank says that it has written its part."""
        return self.temporary / f"written-{rank}"

    def _has_begun(self) -> bool:
        try:
            return (self.temporary / ATTEMPT).read_text(encoding="utf-8") == self._job.attempt
        except OSError:
            return False

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self.cancel.wait(_LOOK_SECONDS):
                raise _Cancelled


class _Cancelled(Exception):
    """Another rank has failed."""
