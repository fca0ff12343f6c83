"""Checkpoints that know no layout: what one layout saved, any other resumes.

Each process writes and reads its own ZeRO fragments as boxes of the logical tensors NAME/master,
NAME/exp_avg, NAME/exp_avg_sq and NAME/ema (float32, without padding); nothing is gathered. The
directory is described in `checkpoint.directory`, saving in the background in `checkpoint.writer`.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sedd_scale.arrays import Shape
from sedd_scale.checkpoint.boxes import BoxLoadPlanner, LogicalTensor, valid_numel
from sedd_scale.checkpoint.directory import (
    find_checkpoint,
    first_good,
    read_meta,
    resume_candidates,
)
from sedd_scale.checkpoint.files import READ_ERRORS
from sedd_scale.checkpoint.manifest import (
    files_of_rank,
    first_wrong_hash,
    first_wrong_size,
    read_manifest,
)
from sedd_scale.checkpoint.state import all_shapes, fragment_tensors
from sedd_scale.errors import CheckpointError, DamagedCheckpointError
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.agreement import from_first, together
from sedd_scale.parallel.layout import Layout

if TYPE_CHECKING:  # evaluation and sampling load weights without an engine
    from sedd_scale.engine.fragments import ZeroFragments


def load_newest(
    run_dir: str | Path,
    fragments: "ZeroFragments",
    *,
    verify: bool = True,
    check: Callable[[Path, dict[str, Any]], None] = lambda path, meta: None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Path, dict[str, Any]]:
    """Load the newest checkpoint of a run that is not damaged; returns its directory and meta.json.

    Collective. Every damaged one that is passed over is named on stderr, and to `say`.

    Args:
        verify, check: as `load_checkpoint`.

    Raises:
        CheckpointError: on every process: there is no good checkpoint, or the newest good one is of
            another model or refused by `check`.
    """
    candidates, complaint = from_first(lambda: resume_candidates(run_dir))
    path, meta, failures = first_good(
        run_dir,
        candidates,
        complaint,
        lambda path: load_checkpoint(path, fragments, verify=verify, check=check),
    )
    for failure in failures:
        line = f"warning: {failure}; went on from {path} instead"
        say(line)
        if fragments.layout.rank == 0:
            print(line, file=sys.stderr, flush=True)
    return path, meta


def load_checkpoint(
    path: str | Path,
    fragments: "ZeroFragments",
    *,
    verify: bool = True,
    check: Callable[[Path, dict[str, Any]], None] = lambda path, meta: None,
) -> dict[str, Any]:
    """Load masters, moments, averages and the optimizer's step in place; returns meta.json.

    Collective. Nothing is overwritten unless the checkpoint is complete and of this model.

    Args:
        path: as `find_checkpoint` takes it.
        verify: hash every file first, each process a part of them; sizes are always compared.
        check: called with the directory and meta.json before anything is loaded.

    Raises:
        DamagedCheckpointError: on every process, when its files are not what was written.
        CheckpointError: on every process, when there is none, or it is of another model.
    """
    layout = fragments.layout
    with together(CheckpointError):
        path = find_checkpoint(path)
        verify_files(path, hashes=verify, rank=layout.rank, num_ranks=layout.world_size)
    with together(CheckpointError):
        meta = read_meta(path)
        check(Path(path), meta)
        metadata = read_metadata(Path(path))
    shapes = all_shapes(fragments)
    with together(CheckpointError):
        check_state(path, shapes, metadata)
    fragments.ensure_state()
    with _read_errors(path):
        dcp.load(
            fragment_tensors(fragments, saving=False),
            storage_reader=dcp.FileSystemReader(path),
            planner=BoxLoadPlanner(),
        )
    fragments.set_step(int(meta["optimizer_step"]))
    fragments.refresh_parameters()
    return meta


@torch.no_grad()
def load_weights(
    path: str | Path,
    parameters: Iterable[LogicalParameter],
    layout: Layout,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Load one kind of weights into plain parameters, for sampling and evaluation.

    Each process reads its own shards by itself; nothing here is collective. Padding becomes zero.
    Returns meta.json.

    Args:
        path: a run directory, its checkpoints/ folder, or one step-N directory.
        weights: "ema" or "master".
        dtype: cast the parameters to it; None keeps theirs.
        verify: hash every file first; sizes are always compared.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another model.
    """
    assert weights in ("ema", "master"), weights
    path = find_checkpoint(path)
    verify_files(path, hashes=verify)
    meta = read_meta(path)
    metadata = read_metadata(path)
    parameters = list(parameters)
    shapes = {f"{logical.name}/{weights}": logical.shape for logical in parameters}
    # A stage of a pipeline holds some of the names only.
    check_state(path, shapes, metadata, allow_more=layout.pipeline > 1)
    tensors = {}
    for logical in parameters:
        parameter = logical.parameter
        parameter.data = parameter.data.to(dtype or parameter.dtype).contiguous()
        assert logical.shard is not None, logical.name
        flat = logical.shard.view(-1)
        flat[valid_numel(logical) :].zero_()
        tensor = LogicalTensor(logical.shape)
        tensor.add(logical, flat, 0)
        tensors[f"{logical.name}/{weights}"] = tensor
    with _read_errors(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            tensors,
            storage_reader=dcp.FileSystemReader(path),
            planner=BoxLoadPlanner(),
            no_dist=True,
        )
    return meta


def verify_files(path: Path, *, hashes: bool, rank: int = 0, num_ranks: int = 1) -> None:
    """Compare this process's share of the files, and the sizes of all, with the manifest.

    Raises:
        DamagedCheckpointError: naming the file that is not what was written.
    """
    try:
        files = read_manifest(path)
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error
    wrong = first_wrong_size(path, files)
    if wrong is None and hashes:
        wrong = first_wrong_hash(path, files_of_rank(files, rank, num_ranks))
    if wrong is not None:
        raise DamagedCheckpointError(wrong)


def read_metadata(path: Path) -> Metadata:
    """The checkpoint's index of tensors and files."""
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
    except READ_ERRORS as error:
        raise DamagedCheckpointError(
            f"checkpoint file {path / '.metadata'} is damaged: {type(error).__name__}: {error}"
        ) from error
    return metadata


def check_state(
    path: str | Path,
    shapes: Mapping[str, Shape],
    metadata: Metadata,
    *,
    allow_more: bool = False,
) -> None:
    """Raise CheckpointError where a checkpoint's tensors NAME/KEY are not the model's.

    Args:
        shapes: of the model's tensors NAME/KEY.
        allow_more: others may be there too.
    """
    sizes = {
        entry: tuple(tensor.size)
        for entry, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    expected = {entry.rpartition("/")[0]: shape for entry, shape in shapes.items()}
    lacking = {entry.rpartition("/")[0] for entry in shapes.keys() - sizes.keys()}
    found: dict[str, Shape] = {}
    for entry, size in sizes.items():
        name = entry.rpartition("/")[0]
        if name in lacking or (name not in expected and allow_more):
            continue
        if name not in found or size != tuple(expected.get(name, size)):
            found[name] = size
    check_tensors(path, expected, found, fault="is of another model")


def check_tensors(
    path: str | Path,
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    fault: str = "does not hold the model it describes",
) -> None:
    """Refuse a set of tensors that is not exactly the model's.

    Args:
        fault: what an error says of `path`.

    Raises:
        CheckpointError: names the tensors that are missing, unknown or of another shape, with the
            shapes they should have.
    """
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    extra = [f"{name} {list(shape)}" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        f"{what} {_few(names)}"
        for what, names in (("missing", missing), ("unknown", extra), ("misshapen:", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} {fault}: {'; '.join(problems)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@contextlib.contextmanager
def _read_errors(path: str | Path) -> Iterator[None]:
    """What torch raises on every process when any fails, as one line."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise DamagedCheckpointError(
            f"cannot read checkpoint {path}: rank {rank}: {type(cause).__name__}: {cause}"
        ) from error
