"""Our own checkpoints, read and written one tensor at a time, in one process and without a network.

A run reads and writes its own boxes (`checkpoint.reading`); this is for conversions, which meet
tensors whole, one after the other.
"""

import functools
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorStorageMetadata,
)

from sedd_scale.arrays import Shape
from sedd_scale.checkpoint.boxes import BoxSavePlanner, LogicalTensor
from sedd_scale.checkpoint.directory import (
    begin_checkpoint,
    find_checkpoint,
    is_ours,
    meta_text,
    publish_checkpoint,
    read_meta,
)
from sedd_scale.checkpoint.files import READ_ERRORS, HashingWriter
from sedd_scale.checkpoint.manifest import FileRecord, write_manifest
from sedd_scale.checkpoint.reading import check_state, load_weights, read_metadata, verify_files
from sedd_scale.config import Config, config_from_dict
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import (
    CheckpointSource,
    Description,
    FileSource,
    model_shapes,
    tokenizer_in,
)
from sedd_scale.interop.foreign_files import STANDARD_FILES, CheckpointFiles
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout
from sedd_scale.planning.model_states import update_rule
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY
from sedd_scale.tokenizers.opening import open_tokenizer

# What a foreign format told that has no key of ours, in meta.json.
DETAILS_KEY = "foreign"


def state_keys(config: Config, name: str) -> tuple[str, ...]:
    """What a run keeps of a parameter."""
    return update_rule(config.optimizer.name, name).state_keys


class NativeSource(FileSource):
    """A run directory, its checkpoints/ folder, or one step-N directory; it says all of itself."""

    format = "native"

    def __init__(self, files: CheckpointFiles, assumptions: Assumptions) -> None:
        self.path = find_checkpoint(files.path)
        meta = read_meta(self.path)
        try:
            config = config_from_dict(meta["config"])
            config = config.override(f"model.vocab_size={meta['num_tokens']}")
            if meta["block_length"] is not None:
                config = config.override(f"data.block_length={meta['block_length']}")
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self.described = Description(
            config=config,
            block_length=meta["block_length"],
            step=int(meta["step"]),
            optimizer_step=int(meta["optimizer_step"]),
            tokens=int(meta["tokens"]),
            tokenizer_directory=tokenizer_in(self.path),
            details=meta.get(DETAILS_KEY) or {},
        )
        self._reader = dcp.FileSystemReader(self.path)
        self._metadata = read_metadata(self.path)
        verify_files(self.path, hashes=files.verify)
        self._keys = {name: state_keys(config, name) for name in model_shapes(config)}
        # What every parameter has: of Muon's matrices there are no moments of AdamW.
        self.holds = frozenset.intersection(*map(frozenset, self._keys.values()))
        shapes = {
            f"{name}/{key}": shape
            for name, shape in model_shapes(config).items()
            for key in self._keys[name]
        }
        check_state(self.path, shapes, self._metadata)

    @staticmethod
    def claims(files: CheckpointFiles) -> bool:
        """Whether a run or a checkpoint of ours is there, and no weights beside it."""
        path = files.path
        if not is_ours(path):
            return False
        if path.is_dir() and any((path / name).exists() for name in STANDARD_FILES):
            raise CheckpointError(
                f"{path} holds a run and weights of another format: name one of them, as "
                f"{path}/checkpoints or in a directory of its own"
            )
        return True

    def read(self, name: str, key: str) -> Tensor:
        """As of any source; what an optimizer keeps of one parameter is there for that one."""
        if key in self._keys[name]:
            return self._read(name, key)
        return super().read(name, key)

    def _read(self, name: str, key: str) -> Tensor:
        # What dcp.load does for a state dict of this one tensor, its index being read already.
        tensor = torch.empty(self.shapes[name])
        planner = dcp.DefaultLoadPlanner()
        try:
            planner.set_up_planner({f"{name}/{key}": tensor}, self._metadata, True)
            self._reader.set_up_storage_reader(self._metadata, True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        except READ_ERRORS as error:
            raise CheckpointError(
                f"checkpoint {self.path} is damaged: {type(error).__name__}: {error}"
            ) from error
        return tensor

    def load(self, parameters: Iterable[LogicalParameter], layout: Layout, weights: str) -> None:
        """As of any source; box by box, so that a process reads its own shards alone."""
        load_weights(self.path, parameters, layout, weights=weights, verify=False)

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the checkpoint has them."""
        rows = []
        for name, tensor in sorted(self._metadata.state_dict_metadata.items()):
            if isinstance(tensor, TensorStorageMetadata):
                dtype = tensor.properties.dtype
                size = tensor.size.numel() * dtype.itemsize
                rows.append((name, tuple(tensor.size), str(dtype).removeprefix("torch."), size))
        return rows


class _LazyTensor(LogicalTensor):
    """A whole logical tensor that is read when torch.distributed.checkpoint writes it.

    Args:
        buffer: float32, large enough; the tensor is in it until the next one is. torch.save leaves
            what it wrote to the garbage collector, which may come late.
    """

    def __init__(self, source: CheckpointSource, name: str, key: str, buffer: Tensor) -> None:
        super().__init__(source.shapes[name])
        self._read = functools.partial(source.read, name, key)
        begin = torch.Size([0] * len(self._size))
        self._parts[begin] = buffer.narrow(0, 0, self._size.numel()).view(self._size)

    def part(self, index: MetadataIndex) -> Tensor:
        """The tensor."""
        return super().part(index).copy_(self._read())


def write_native_run(source: CheckpointSource, directory: Path) -> None:
    """Write a run directory whose one checkpoint is what the source holds.

    Weights that come alone become both masters and averages, with moments of zero.

    Raises:
        CheckpointError: a tensor cannot be read or written.
    """
    described = source.described
    step = described.step
    directory.mkdir()
    temporary = begin_checkpoint(directory / "checkpoints", step)
    records = _write_tensors(source, temporary)
    tokenizer_fingerprint = None
    if described.tokenizer_directory is not None:
        tokenizer = open_tokenizer(described.tokenizer_directory)
        tokenizer_fingerprint = tokenizer.fingerprint
        tokenizer.save(temporary / TOKENIZER_DIRECTORY)
    about = {
        "step": step,
        "samples_seen": 0,
        "tokens": described.tokens,
        "config": described.config.to_dict(),
        "dataset_fingerprint": None,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "num_tokens": described.num_tokens,
        "block_length": described.block_length,
        DETAILS_KEY: dict(described.details),
    }
    text = meta_text(about, optimizer_step=described.optimizer_step, shapes=source.shapes)
    (temporary / "meta.json").write_text(text, encoding="utf-8")
    write_manifest(temporary, records)
    publish_checkpoint(temporary, keep=0)
    (directory / "config.yaml").write_text(described.config.to_yaml(), encoding="utf-8")


def _write_tensors(source: CheckpointSource, directory: Path) -> dict[str, FileRecord]:
    """Write all tensors, one after the other; size and hash of the files that hold them."""
    buffer = torch.empty(max(math.prod(shape) for shape in source.shapes.values()))
    tensors = {
        f"{name}/{key}": _LazyTensor(source, name, key, buffer)
        for name in source.shapes
        for key in state_keys(source.described.config, name)
    }
    writer = HashingWriter(directory)  # which asks for a tensor when the one before is written
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(tensors, storage_writer=writer, planner=BoxSavePlanner(), no_dist=True)
    except CheckpointException as error:
        _, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"cannot write {directory}: {writer.failure or cause}") from error
    return writer.records
