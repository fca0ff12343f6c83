"""Flat ranges of parameter shards as boxes of logical tensors, for torch's distributed checkpoint.

A ZeRO fragment is a range of a flattened shard. A range of a matrix is at most three boxes: the
rest of a row, whole rows, the beginning of a row. Shifted by the tensor-parallel offset they are
boxes of the logical tensor, which the checkpoint stores and any other layout reads by overlap:
nothing is gathered, neither to save nor to load.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from sedd_scale.model.parameters import LogicalParameter


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor that is contiguous in row-major order.

    Attributes:
        offsets: the first element's indices.
        sizes: its shape.
        begin: where its elements start within the flat range it came from.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int


def boxes_of_range(shape: Sequence[int], start: int, numel: int) -> Iterator[Box]:
    """The row-major range [start, start + numel) of a tensor of `shape` as few boxes, in order."""
    assert shape and start >= 0 and start + numel <= math.prod(shape), (shape, start, numel)
    if len(shape) == 1:
        if numel > 0:
            yield Box((start,), (numel,), 0)
        return
    row_numel = math.prod(shape[1:])
    position, end = start, start + numel
    while position < end:
        row, column = divmod(position, row_numel)
        if column == 0 and end - position >= row_numel:
            rows = (end - position) // row_numel
            zeros = (0,) * (len(shape) - 1)
            yield Box((row, *zeros), (rows, *shape[1:]), position - start)
            position += rows * row_numel
        else:
            length = min(row_numel - column, end - position)
            for box in boxes_of_range(shape[1:], column, length):
                begin = position - start + box.begin
                yield Box((row, *box.offsets), (1, *box.sizes), begin)
            position += length


def logical_boxes(parameter: LogicalParameter, start: int, numel: int) -> Iterator[Box]:
    """A range of the flattened shard as boxes of the logical tensor, without padding."""
    offsets = [0] * len(parameter.shape)
    if parameter.partition_dim is not None:
        offsets[parameter.partition_dim] = parameter.offset
    end = min(start + numel, valid_numel(parameter))
    if end <= start:
        return
    for box in boxes_of_range(parameter.local_shape, start, end - start):
        yield Box(tuple(a + b for a, b in zip(box.offsets, offsets)), box.sizes, box.begin)


def valid_numel(parameter: LogicalParameter) -> int:
    """Length of the flattened shard before its padding: only rows (axis 0) are ever padded."""
    offset = parameter.offset if parameter.partition_dim == 0 else 0
    rows = max(0, min(parameter.local_shape[0], parameter.shape[0] - offset))
    return rows * math.prod(parameter.local_shape[1:])


class LogicalTensor:
    """This process's boxes of a logical tensor, each a view of the memory that holds it.

    It speaks torch.distributed.checkpoint's protocol for tensors that several processes share.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._size = torch.Size(shape)
        self._parts: dict[torch.Size, Tensor] = {}

    def add(self, parameter: LogicalParameter, flat: Tensor, start: int) -> None:
        """Put `flat`, a range from `start` of the parameter's flattened shard, behind its boxes."""
        for box in logical_boxes(parameter, start, flat.numel()):
            part = flat.narrow(0, box.begin, math.prod(box.sizes)).view(box.sizes)
            assert torch.Size(box.offsets) not in self._parts
            self._parts[torch.Size(box.offsets)] = part

    def size(self) -> torch.Size:
        """The logical tensor's shape."""
        return self._size

    def part(self, index: MetadataIndex) -> Tensor:
        """The box that begins at the index's offset."""
        assert index.offset is not None
        return self._parts[index.offset]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, part.size()),
                    properties=TensorProperties(dtype=part.dtype),
                    size=self._size,
                ),
            )
            for offset, part in self._parts.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, part.size()) for offset, part in self._parts.items()]


class BoxSavePlanner(DefaultSavePlanner):
    """torch's planner, finding the data of `LogicalTensor`s; it refuses overlaps and gaps."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The memory to write, as a storage of its own: torch would copy a part of a larger one."""
        part: Tensor = self.state_dict[index.fqn].part(index)
        return torch.from_numpy(part.numpy()) if part.device.type == "cpu" else part


class BoxLoadPlanner(DefaultLoadPlanner):
    """torch's planner, finding the memory of `LogicalTensor`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """As the default, which however would deep-copy what is no tensor and load the copy."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory to fill."""
        part: Tensor = self.state_dict[index.fqn].part(index)
        return part
