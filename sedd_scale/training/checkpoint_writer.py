"""Saves that do not hold up the training: copy, go on, write in the background, publish.

    with CheckpointWriter(run_dir, ...) as writer:      # collective, as all of its methods
        for step in steps:
            ...
            writer.poll()                               # at every step: has a save ended?
            if due:
                writer.save(meta)                       # returns once the state is copied
        writer.wait()

A thread of every rank writes the rank's own file, fsyncs and hashes it, and leaves a note in the
directory; the thread of rank 0 waits for the notes of all ranks, writes the manifest, renames the
directory and lets `latest` name it. The threads talk through these files alone, never through a
process group, so they can neither disturb the training's collectives nor hang in one when a rank
dies. How a save ended is agreed by the main threads at step boundaries.
"""

import contextlib
import importlib.metadata
import json
import os
import pickle
import platform
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from sedd_scale import __version__
from sedd_scale.config_sections import CheckpointConfig
from sedd_scale.data.atomic import write_atomically
from sedd_scale.errors import CheckpointError, LostRankError
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout
from sedd_scale.training import fault_points
from sedd_scale.training.boxes import BoxSavePlanner, LogicalTensor
from sedd_scale.training.checkpoint_directory import (
    FORMAT,
    FORMAT_VERSION,
    META_KEYS,
    begin_checkpoint,
    publish_checkpoint,
    remove_leftovers,
    restore_replaced,
)
from sedd_scale.training.checkpoint_files import HashingWriter
from sedd_scale.training.checkpoint_manifest import FileRecord, write_manifest
from sedd_scale.training.checkpoint_state import (
    HostCopy,
    all_shapes,
    fragment_tensors,
    raise_together,
    state_bytes,
)

if TYPE_CHECKING:
    from sedd_scale.parallel.fragments import ZeroFragments

ATTEMPT = "attempt"
"""Written by rank 0 into the emptied directory: which save the other ranks may write to it."""

_TEST_BYTES = 1 << 20
_LOOK_SECONDS = 0.01
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 60.0
_LOST_GRACE_SECONDS = 2.0

_RUNNING, _DONE, _FAILED = 0, 1, 2


@dataclass(frozen=True)
class SaveReport:
    """How a save went, alike on every rank but for the times.

    Attributes:
        step: of the checkpoint.
        path: its directory.
        error: why it failed, or None.
        seconds: from its call until it was published or had failed.
        blocked_seconds: of these, how long the training stood still.
        num_bytes: of all its tensors.
    """

    step: int
    path: Path
    error: str | None
    seconds: float
    blocked_seconds: float
    num_bytes: int


class CheckpointWriter:
    """Writes the checkpoints of a run; its methods are collective over all processes.

    Making one tests that every rank can write and that a checkpoint fits on the disk.

    Args:
        engine_fragments: what to save.
        parameters: all of the engine's parameters.
        config: how to save and what to keep.
        tokenizer_directory: copied into every checkpoint, so that it can be sampled from alone.
        say: called on rank 0 with one line at a time.

    Raises:
        CheckpointError: on every process, when any cannot write or the disk is too small.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        engine_fragments: "ZeroFragments",
        parameters: Sequence[LogicalParameter],
        layout: Layout,
        config: CheckpointConfig,
        tokenizer_directory: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = Path(run_dir) / "checkpoints"
        self._fragments, self._parameters = engine_fragments, parameters
        self._layout, self._config = layout, config
        self._tokenizer_directory, self._say = tokenizer_directory, say
        self._copy = HostCopy()
        self._plan: _Plan | None = None
        self._save: _RunningSave | None = None
        # On the host: a poll must not wait for the GPU's queue.
        self._group: dist.ProcessGroup | None = None
        if layout.device.type == "cuda" and layout.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._shapes = all_shapes(parameters, layout, self._group)
        self._num_bytes = state_bytes(self._shapes)
        raise_together(self._cannot_tidy(), self._group)
        raise_together(self._cannot_write(), self._group)
        identity = [secrets.token_hex(8)]
        dist.broadcast_object_list(identity, group=self._group)
        self._identity, self._num_saves = identity[0], 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
            return
        # The other ranks may not be there to agree; what needs no agreement goes on for a while.
        if self._save is not None:
            if issubclass(error_type, LostRankError):
                # The lost rank may have written its part; if not, it is of no use to wait for it.
                self._save.thread.join(_LOST_GRACE_SECONDS)
                self._save.cancel.set()
            self._save.thread.join(_GRACE_SECONDS)

    def save(self, meta: Mapping[str, Any]) -> None:
        """Begin to save the state as it is now; wait for an earlier save first, if one is running.

        Args:
            meta: the run's place and identity, `META_KEYS`, as JSON values.

        Raises:
            CheckpointError: as `poll`.
        """
        assert set(meta) >= META_KEYS, META_KEYS - set(meta)
        step, begun = int(meta["step"]), time.perf_counter()
        if self._save is not None:
            self._say(
                f"step {step}: saving waits for the checkpoint of step {self._save.step}, which is "
                "still being written; a larger checkpoint.every or a faster disk would avoid it"
            )
            self.wait()
        self._fragments.ensure_state()
        if self._config.async_save:
            tensors = self._copy.take(self._fragments, self._parameters, self._layout)
        else:
            tensors = fragment_tensors(self._fragments, self._parameters, self._layout, saving=True)
            if self._layout.device.type == "cuda":
                torch.cuda.synchronize(self._layout.device)
        if self._plan is None:
            self._plan = _make_plan(tensors, self._layout, self._group)
        self._num_saves += 1
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **meta,
            "optimizer_step": self._fragments.get_step(),
            "versions": versions(),
            "shapes": self._shapes,
        }
        self._save = _RunningSave(
            folder=self._folder,
            step=step,
            attempt=f"{self._identity}-{self._num_saves}",
            rank=self._layout.rank,
            num_ranks=self._layout.world_size,
            plan=self._plan,
            tensors=tensors,
            about=json.dumps(about, indent=1),
            tokenizer_directory=self._tokenizer_directory,
            config=self._config,
            begun=begun,
        )
        self._save.thread.start()
        if not self._config.async_save:
            self.wait()
        elif self._save is not None:
            self._save.blocked_seconds = time.perf_counter() - begun

    def poll(self) -> SaveReport | None:
        """The report of a save that has ended, or None; to be called at every step.

        Raises:
            CheckpointError: on every process, a save has failed and checkpoint.on_failure=stop.
        """
        if self._save is None:
            return None
        own = self._save.state()
        # Greatest and, negated, least of the states.
        states = torch.tensor([own, -own])
        dist.all_reduce(states, dist.ReduceOp.MAX, group=self._group)
        greatest, least = int(states[0]), -int(states[1])
        if greatest == _FAILED:
            self._save.cancel.set()
        if least == _RUNNING:
            return None
        save, self._save = self._save, None
        save.thread.join()
        error = self._first_error(save) if greatest == _FAILED else None
        report = SaveReport(
            step=save.step,
            path=save.final,
            error=error,
            seconds=save.ended - save.begun,
            blocked_seconds=save.blocked_seconds,
            num_bytes=self._num_bytes,
        )
        if error is None:
            self._say(
                f"saved {report.path} ({report.num_bytes / 1e6:.1f} MB in {report.seconds:.1f} s, "
                f"of which training stood still for {report.blocked_seconds:.2f} s)"
            )
        elif self._config.on_failure == "stop":
            raise CheckpointError(error)
        elif self._layout.rank == 0:
            print(
                f"warning: {error}; training goes on with the checkpoints it has "
                "(checkpoint.on_failure=continue)",
                file=sys.stderr,
                flush=True,
            )
        return report

    def wait(self) -> SaveReport | None:
        """Wait for the running save, if there is one, and report it as `poll` does."""
        report, begun = None, time.perf_counter()
        while (save := self._running()) is not None:
            save.thread.join(_POLL_SECONDS)
            save.blocked_seconds += time.perf_counter() - begun
            begun = time.perf_counter()
            report = self.poll()
        return report

    def close(self) -> None:
        """Wait for the running save, the run's last, and free the host memory.

        Raises:
            CheckpointError: on every process, that save has failed, whatever the policy.
        """
        try:
            report = self.wait()
        finally:
            self._copy.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None
        if report is not None and report.error is not None:
            raise CheckpointError(report.error)

    def _running(self) -> "_RunningSave | None":
        return self._save

    def _first_error(self, save: "_RunningSave") -> str:
        errors: list[Any] = [None] * self._layout.world_size
        dist.all_gather_object(errors, save.error, group=self._group)
        if self._layout.rank == 0:
            # No more than a hopeless directory: the space may be what was missing.
            shutil.rmtree(save.temporary, ignore_errors=True)
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        where = f" on rank {rank}" if self._layout.world_size > 1 else ""
        return f"cannot write checkpoint {save.final}{where}: {error}"

    def _cannot_tidy(self) -> CheckpointError | None:
        """Rank 0 removes what a crash left half-written, which would take up room."""
        if self._layout.rank == 0 and self._folder.is_dir():
            try:
                restore_replaced(self._folder)
                remove_leftovers(self._folder)
            except OSError as error:
                return CheckpointError(f"cannot remove a leftover in {self._folder}: {error}")
        return None

    def _cannot_write(self) -> CheckpointError | None:
        """Why this process could not write a checkpoint, or None."""
        test = self._folder / f"write-test-{self._layout.rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with test.open("wb") as stream:
                stream.write(bytes(_TEST_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            return CheckpointError(
                f"cannot write checkpoint files in {self._folder} on rank {self._layout.rank}: "
                f"{error.strerror}: give a --run-dir that can be written, with "
                f"{self._num_bytes / 1e9:.3g} GB free"
            )
        finally:
            with contextlib.suppress(OSError):
                test.unlink(missing_ok=True)
        if free < self._num_bytes:
            return CheckpointError(
                f"a checkpoint of this model takes {self._num_bytes / 1e9:.3g} GB and "
                f"{self._folder} has {free / 1e9:.3g} GB free: make room or give another --run-dir"
            )
        return None


@dataclass
class _Plan:
    """What this rank writes and, on rank 0, the index of what all write; the same every time."""

    planner: BoxSavePlanner
    own: SavePlan
    index: Metadata | None


def _make_plan(
    tensors: dict[str, LogicalTensor], layout: Layout, group: dist.ProcessGroup | None
) -> _Plan:
    """torch's plan of a save; collective over all processes."""
    is_main = layout.rank == 0
    planner = BoxSavePlanner()
    planner.set_up_planner(tensors, None, is_main)
    of_ranks: list[Any] | None = [None] * layout.world_size if is_main else None
    dist.gather_object(planner.create_local_plan(), of_ranks, group=group)
    plans: list[Any] = [None] * layout.world_size
    index = None
    if of_ranks is not None:
        plans, index = planner.create_global_plan(of_ranks)
        plans = HashingWriter(Path()).prepare_global_plan(plans)
    own: list[Any] = [None]
    dist.scatter_object_list(own, plans, group=group)
    return _Plan(planner, planner.finish_plan(own[0]), index)


class _RunningSave:
    """One rank's share of one save, in a thread of its own."""

    def __init__(
        self,
        *,
        folder: Path,
        step: int,
        attempt: str,
        rank: int,
        num_ranks: int,
        plan: _Plan,
        tensors: dict[str, LogicalTensor],
        about: str,
        tokenizer_directory: Path | None,
        config: CheckpointConfig,
        begun: float,
    ) -> None:
        self.step, self.begun, self.ended = step, begun, begun
        self.blocked_seconds = 0.0
        self.final, self.temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
        self.error: str | None = None
        self.cancel = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"save {step}", daemon=True)
        self._folder, self._attempt = folder, attempt
        self._rank, self._num_ranks = rank, num_ranks
        self._plan, self._tensors = plan, tensors
        self._about, self._tokenizer_directory = about, tokenizer_directory
        self._config = config

    def state(self) -> int:
        """Running, done or failed, as far as this rank knows."""
        if self.thread.is_alive():
            return _RUNNING
        return _DONE if self.error is None else _FAILED

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
        if self._rank == 0:
            begin_checkpoint(self._folder, self.step)
            write_atomically(self.temporary / ATTEMPT, self._attempt.encode())
        else:
            self._wait_until(self._has_begun)
        fault_points.reach("before data")
        self._plan.planner.state_dict = self._tensors
        results = writer.write_data(self._plan.own, self._plan.planner).value()
        fault_points.reach("data written")
        write_atomically(self._note(self._rank), pickle.dumps((results, writer.records)))
        if self._rank == 0:
            self._wait_until(lambda: all(self._note(r).exists() for r in range(self._num_ranks)))
            self._publish(writer)

    def _publish(self, writer: HashingWriter) -> None:
        results: list[Any] = []
        records: dict[str, FileRecord] = {}
        for rank in range(self._num_ranks):
            of_rank, written = pickle.loads(self._note(rank).read_bytes())
            results.append(of_rank)
            records |= written
            self._note(rank).unlink()
        (self.temporary / ATTEMPT).unlink()
        assert self._plan.index is not None
        writer.finish(self._plan.index, results)
        records |= writer.records
        (self.temporary / "meta.json").write_text(self._about, encoding="utf-8")
        if self._tokenizer_directory is not None:
            shutil.copytree(self._tokenizer_directory, self.temporary / "tokenizer")
        write_manifest(self.temporary, records)
        publish_checkpoint(
            self.temporary, keep=self._config.keep, keep_every=self._config.keep_every
        )

    def _note(self, rank: int) -> Path:
        """The file by which a rank says that it has written its part."""
        return self.temporary / f"written-{rank}"

    def _has_begun(self) -> bool:
        try:
            return (self.temporary / ATTEMPT).read_text(encoding="utf-8") == self._attempt
        except OSError:
            return False

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            if self.cancel.wait(_LOOK_SECONDS):
                raise _Cancelled


class _Cancelled(Exception):
    """Another rank has failed."""


def versions() -> dict[str, str]:
    """Of the packages that a checkpoint's content may depend on."""
    packages = ("torch", "deepspeed", "megatron-core")
    return {
        "sedd_scale": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
