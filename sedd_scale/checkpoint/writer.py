"""Saves that do not hold up the training: copy, go on, write in the background, publish.

    with CheckpointWriter(run_dir, ...) as writer:      # collective, as all of its methods
        for step in steps:
            ...
            writer.poll()                               # at every step: has a save ended?
            if due:
                writer.save(meta)                       # returns once the state is copied
        writer.wait()

What the threads in the background do is in `checkpoint.saving`. How a save ended is agreed by the
main threads at step boundaries.
"""

import contextlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sedd_scale.checkpoint.directory import meta_text, remove_leftovers, restore_replaced
from sedd_scale.checkpoint.saving import (
    FAILED,
    RUNNING,
    RunningSave,
    SaveJob,
    SavePlanOfRank,
    make_plan,
)
from sedd_scale.checkpoint.state import HostCopy, all_shapes, fragment_tensors, state_bytes
from sedd_scale.config.sections import CheckpointConfig
from sedd_scale.errors import CheckpointError, LostRankError
from sedd_scale.parallel.agreement import from_first, gathered, together

if TYPE_CHECKING:
    from sedd_scale.engine.fragments import ZeroFragments

_TEST_BYTES = 1 << 20
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 60.0
_LOST_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class SaveReport:
    """Outcome of a save; identical on every rank except for the times.

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
        fragments: what to save.
        config: how to save and what to keep.
        tokenizer_directory: copied into every checkpoint, so that it can be sampled from alone.
        say: called on rank 0 with one line at a time.
        saved: called on every rank with the step of a checkpoint that is complete.

    Raises:
        CheckpointError: on every process, when any cannot write or the disk is too small.
    """

    def __init__(
        self,
        run_dir: str | Path,
        fragments: "ZeroFragments",
        *,
        config: CheckpointConfig,
        tokenizer_directory: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
        saved: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._folder = Path(run_dir) / "checkpoints"
        self._fragments, self._layout, self._config = fragments, fragments.layout, config
        self._tokenizer_directory, self._say = tokenizer_directory, say
        self._saved = saved
        self._copy = HostCopy()
        self._plan: SavePlanOfRank | None = None
        self._save: RunningSave | None = None
        # On the host: a poll must not wait for the GPU's queue.
        self._group: dist.ProcessGroup | None = None
        if self._layout.device.type == "cuda" and self._layout.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        shapes = all_shapes(fragments, self._group)
        self._num_bytes = state_bytes(shapes)
        masters = {name.rpartition("/"): shape for name, shape in shapes.items()}
        self._shapes = {name: shape for (name, _, key), shape in masters.items() if key == "master"}
        with together(CheckpointError, self._group):
            self._tidy()
        with together(CheckpointError, self._group):
            self._test_disk()
        self._identity = from_first(lambda: secrets.token_hex(8), self._group)
        self._num_saves = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
            return
        # The other ranks may not be there to agree; what needs no agreement may run on for a while.
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
        step, begun = int(meta["step"]), time.perf_counter()
        if self._save is not None:
            self._say(
                f"step {step}: saving waits for the checkpoint of step {self._save.step}, which is "
                "still being written; a larger checkpoint.every or a faster disk would avoid it"
            )
            self.wait()
        self._fragments.ensure_state()
        if self._config.async_save:
            tensors = self._copy.take(self._fragments)
        else:
            tensors = fragment_tensors(self._fragments, saving=True)
            if self._layout.device.type == "cuda":
                torch.cuda.synchronize(self._layout.device)
        if self._plan is None:
            self._plan = make_plan(tensors, self._layout, self._group)
        self._num_saves += 1
        job = SaveJob(
            folder=self._folder,
            step=step,
            attempt=f"{self._identity}-{self._num_saves}",
            rank=self._layout.rank,
            num_ranks=self._layout.world_size,
            plan=self._plan,
            tensors=tensors,
            meta_text=meta_text(
                meta, optimizer_step=self._fragments.get_step(), shapes=self._shapes
            ),
            tokenizer_directory=self._tokenizer_directory,
            config=self._config,
        )
        self._save = RunningSave(job, begun=begun)
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
        if self._layout.world_size > 1:
            dist.all_reduce(states, dist.ReduceOp.MAX, group=self._group)
        greatest, least = int(states[0]), -int(states[1])
        if greatest == FAILED:
            self._save.cancel.set()
        if least == RUNNING:
            return None
        save, self._save = self._save, None
        save.thread.join()
        error = self._first_error(save) if greatest == FAILED else None
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
            self._saved(report.step)
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
        while True:
            save = self._save
            if save is None:
                return report
            save.thread.join(_POLL_SECONDS)
            save.blocked_seconds += time.perf_counter() - begun
            begun = time.perf_counter()
            report = self.poll()

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

    def _first_error(self, save: "RunningSave") -> str:
        errors = gathered(save.error, self._group)
        if self._layout.rank == 0:
            # No more than a hopeless directory: the space may be what was missing.
            shutil.rmtree(save.temporary, ignore_errors=True)
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        where = f" on rank {rank}" if self._layout.world_size > 1 else ""
        return f"cannot write checkpoint {save.final}{where}: {error}"

    def _tidy(self) -> None:
        """Rank 0 removes what a crash left half-written, which would take up room."""
        if self._layout.rank == 0 and self._folder.is_dir():
            try:
                restore_replaced(self._folder)
                remove_leftovers(self._folder)
            except OSError as error:
                raise CheckpointError(
                    f"cannot remove a leftover in {self._folder}: {error}"
                ) from error

    def _test_disk(self) -> None:
        """Raise CheckpointError where this process cannot write, or there is no room."""
        test = self._folder / f"write-test-{self._layout.rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with test.open("wb") as stream:
                stream.write(bytes(_TEST_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoint files in {self._folder} on rank {self._layout.rank}: "
                f"{error.strerror}: give a --run-dir that can be written, with "
                f"{self._num_bytes / 1e9:.3g} GB free"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                test.unlink(missing_ok=True)
        if free < self._num_bytes:
            raise CheckpointError(
                f"a checkpoint of this model takes {self._num_bytes / 1e9:.3g} GB and "
                f"{self._folder} has {free / 1e9:.3g} GB free: make room or give another --run-dir"
            )
