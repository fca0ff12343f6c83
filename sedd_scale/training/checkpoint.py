"""Checkpoints that know no layout: what one layout saved, any other resumes.

Each process writes and reads its own ZeRO fragments as boxes of the logical tensors NAME/master,
NAME/exp_avg, NAME/exp_avg_sq and NAME/ema (float32, without padding); nothing is gathered. The
directory is described in `checkpoint_directory`.
"""

import contextlib
import importlib.metadata
import json
import pickle
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sedd_scale import __version__
from sedd_scale.errors import CheckpointError
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout
from sedd_scale.training.boxes import BoxLoadPlanner, BoxSavePlanner, LogicalTensor, valid_numel
from sedd_scale.training.checkpoint_directory import (
    FORMAT,
    FORMAT_VERSION,
    META_KEYS,
    begin_checkpoint,
    find_checkpoint,
    has_checkpoint,
    publish_checkpoint,
    read_meta,
)

if TYPE_CHECKING:  # evaluation and sampling load weights without an engine
    from sedd_scale.parallel.fragments import ZeroFragments

__all__ = [
    "find_checkpoint",
    "has_checkpoint",
    "load_checkpoint",
    "load_weights",
    "read_meta",
    "save_checkpoint",
]

KEYS = ("master", "exp_avg", "exp_avg_sq", "ema")

_UNREADABLE_PICKLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    MemoryError,
)


def save_checkpoint(
    run_dir: str | Path,
    *,
    engine_fragments: "ZeroFragments",
    parameters: Sequence[LogicalParameter],
    layout: Layout,
    meta: Mapping[str, Any],
    tokenizer_directory: Path | None = None,
    keep: int = 3,
) -> Path:
    """Write a checkpoint, let `latest` name it, and remove older ones beyond `keep`.

    Collective over all processes.

    Args:
        meta: the run's place and identity, `META_KEYS`, as JSON values.
        tokenizer_directory: copied into the checkpoint, so that it can be sampled from alone.
        keep: checkpoints kept, counting this one; 0: all.

    Raises:
        CheckpointError: on every process, when any could not write; `latest` is as before.
    """
    assert set(meta) >= META_KEYS, META_KEYS - set(meta)
    folder = Path(run_dir) / "checkpoints"
    step = int(meta["step"])
    final, temporary = folder / f"step-{step}", folder / f"step-{step}.tmp"
    engine_fragments.ensure_state()
    shapes = _all_shapes(parameters, layout)

    def begin() -> None:
        begin_checkpoint(folder, step)

    def publish() -> None:
        about = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **meta,
            "optimizer_step": engine_fragments.get_step(),
            "versions": _versions(),
            "shapes": shapes,
        }
        (temporary / "meta.json").write_text(json.dumps(about, indent=1))
        if tokenizer_directory is not None:
            shutil.copytree(tokenizer_directory, temporary / "tokenizer")
        publish_checkpoint(temporary, keep=keep)

    what = f"cannot write checkpoint {final}"
    _on_main(layout, what, begin)
    with _checkpoint_errors(what):
        dcp.save(
            _fragment_tensors(engine_fragments, parameters, layout, saving=True),
            storage_writer=dcp.FileSystemWriter(temporary),
            planner=BoxSavePlanner(),
        )
    _on_main(layout, what, publish)
    return final


def load_checkpoint(
    path: str | Path,
    *,
    engine_fragments: "ZeroFragments",
    parameters: Sequence[LogicalParameter],
    layout: Layout,
) -> dict[str, Any]:
    """Load masters, moments, averages and the optimizer's step in place; returns meta.json.

    Collective over all processes. Nothing is overwritten unless the checkpoint is complete and of
    this model.

    Args:
        path: a run directory, its checkpoints/ folder, or one step-N directory.

    Raises:
        CheckpointError: on every process, when there is no such checkpoint, or it is damaged or of
            another model.
    """
    meta: dict[str, Any] = {}
    metadata: Metadata | None = None
    error = None
    try:
        path = find_checkpoint(path)
        meta = read_meta(path)
        metadata = _read_metadata(path)
    except CheckpointError as caught:
        error = str(caught)
    _raise_together(error)
    assert metadata is not None
    shapes = _all_shapes(parameters, layout)
    _raise_together(_mismatch(path, shapes, metadata, KEYS))
    engine_fragments.ensure_state()
    with _checkpoint_errors(f"cannot read checkpoint {path}"):
        dcp.load(
            _fragment_tensors(engine_fragments, parameters, layout, saving=False),
            storage_reader=dcp.FileSystemReader(path),
            planner=BoxLoadPlanner(),
        )
    engine_fragments.set_step(int(meta["optimizer_step"]))
    engine_fragments.refresh_parameters()
    return meta


@torch.no_grad()
def load_weights(
    path: str | Path,
    parameters: Iterable[LogicalParameter],
    layout: Layout,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Load one kind of weights into plain parameters, for sampling and evaluation.

    Each process reads its own shards by itself; nothing here is collective. Padding becomes zero.
    Returns meta.json.

    Args:
        path: a run directory, its checkpoints/ folder, or one step-N directory.
        weights: "ema" or "master".
        dtype: cast the parameters to it; None keeps theirs.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged or of another model.
    """
    assert weights in ("ema", "master"), weights
    path = find_checkpoint(path)
    meta = read_meta(path)
    metadata = _read_metadata(path)
    parameters = list(parameters)
    shapes = {logical.name: logical.shape for logical in parameters}
    # A stage of a pipeline holds some of the names only.
    error = _mismatch(path, shapes, metadata, (weights,), allow_more=layout.pipeline > 1)
    if error is not None:
        raise CheckpointError(error)
    tensors = {}
    for logical in parameters:
        parameter = logical.parameter
        assert tuple(parameter.shape) == logical.local_shape, (logical.name, parameter.shape)
        parameter.data = parameter.data.to(dtype or parameter.dtype).contiguous()
        flat = parameter.data.view(-1)
        flat[valid_numel(logical) :].zero_()
        tensor = LogicalTensor(logical.shape)
        tensor.add(logical, flat, 0)
        tensors[f"{logical.name}/{weights}"] = tensor
    with _checkpoint_errors(f"cannot read checkpoint {path}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            tensors,
            storage_reader=dcp.FileSystemReader(path),
            planner=BoxLoadPlanner(),
            no_dist=True,
        )
    return meta


def _fragment_tensors(
    fragments: "ZeroFragments",
    parameters: Sequence[LogicalParameter],
    layout: Layout,
    *,
    saving: bool,
) -> dict[str, LogicalTensor]:
    tensors = {}
    for logical in parameters:
        # Tensor ranks hold copies of what they do not split: all read, the first writes.
        has_part = logical.partition_dim is not None or layout.tensor_rank == 0 or not saving
        for key in KEYS:
            tensor = LogicalTensor(logical.shape)
            fragment = fragments.get(logical, key) if has_part else None
            if fragment is not None:
                tensor.add(logical, fragment.flat, fragment.start)
            tensors[f"{logical.name}/{key}"] = tensor
    return tensors


def _all_shapes(
    parameters: Sequence[LogicalParameter], layout: Layout
) -> dict[str, tuple[int, ...]]:
    """Logical shapes of all pipeline stages' parameters; collective over all processes."""
    speaks = layout.tensor_rank == 0 and layout.data_rank == 0
    own = {logical.name: logical.shape for logical in parameters} if speaks else {}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    return {name: shape for shapes in of_ranks for name, shape in shapes.items()}


def _read_metadata(path: Path) -> Metadata:
    """The checkpoint's index of tensors and files, after a look that the files are all there."""
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
        files: dict[str, int] = {}
        for info in metadata.storage_data.values():
            end = info.offset + info.length
            files[info.relative_path] = max(end, files.get(info.relative_path, 0))
    except _UNREADABLE_PICKLE as error:
        raise CheckpointError(
            f"checkpoint file {path / '.metadata'} is damaged: {type(error).__name__}: {error}"
        ) from error
    for name, length in files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path} is incomplete: {name} is missing")
        if (path / name).stat().st_size < length:
            raise CheckpointError(
                f"checkpoint file {path / name} is cut short: "
                f"{(path / name).stat().st_size} of {length} bytes"
            )
    return metadata


def _mismatch(
    path: str | Path,
    shapes: Mapping[str, Sequence[int]],
    metadata: Metadata,
    keys: Sequence[str],
    *,
    allow_more: bool = False,
) -> str | None:
    """One line on how the checkpoint's tensors differ from the model's, or None."""
    found = {
        name: tuple(tensor.size)
        for name, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    lines = []
    for name, shape in shapes.items():
        saved = [found.get(f"{name}/{key}") for key in keys]
        wrong = [size for size in saved if size is not None and size != tuple(shape)]
        if wrong:
            lines.append(f"{name} is {list(shape)} in the model and {list(wrong[0])} in it")
        elif None in saved:
            lines.append(f"{name} {list(shape)} is missing from it")
    if not allow_more:
        extra = {name.rsplit("/", 1)[0]: shape for name, shape in found.items()}
        lines += [
            f"{name} {list(shape)} is not in the model"
            for name, shape in extra.items()
            if name not in shapes
        ]
    if not lines:
        return None
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return f"checkpoint {path} is of another model: {'; '.join(lines[:3])}{more}"


def _raise_together(error: str | None) -> None:
    """Raise on every process what went wrong on any; collective over all processes."""
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise CheckpointError(error)


def _on_main(layout: Layout, what: str, function: Callable[[], None]) -> None:
    """Call the function on the first process; all wait for it and fail if it does."""
    error = None
    if layout.rank == 0:
        try:
            function()
        except (OSError, shutil.Error) as caught:
            error = f"{what}: {caught}"
    _raise_together(error)


@contextlib.contextmanager
def _checkpoint_errors(what: str) -> Iterator[None]:
    """What torch raises on every process when any fails, as one line."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: rank {rank}: {type(cause).__name__}: {cause}") from error


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "megatron-core")
    return {
        "sedd_scale": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
