"""safetensors files, one or many with an index, read and written one tensor at a time.

The layout of a file, public and simple: the length of a JSON header as 8 little-endian bytes, the
header (name to dtype, shape and data_offsets), the tensors' bytes one after the other. A model of
several files has `model.safetensors.index.json`, whose `weight_map` says which file holds what.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.errors import CheckpointError
from sedd_scale.interop.pickled_files import bytes_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000

# Bytes of a number of each type, as a header names it.
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1}


class SafetensorsFile:
    """The tensors of one safetensors file.

    Attributes:
        shapes, dtypes: of each tensor.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        with self._opened() as file:
            for name in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
                part = file.get_slice(name)
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = part.get_dtype()

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type; nothing of the file stays in memory when it is dropped."""
        with self._opened() as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}); fetch it again") from None


def write_safetensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Write float32 tensors as model.safetensors, or as shards and their index.

    Args:
        shapes: of every tensor, in the order in which they are written.
        read: gives one tensor; asked once for each, and the answer is dropped when written.
        shard_bytes: largest size of a file's tensors; a larger tensor has a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        files = [directory / SINGLE_FILE]
    else:
        files = [
            directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    for file, names in zip(files, shards, strict=True):
        _write_file(file, {name: shapes[name] for name in names}, read)
    if len(shards) > 1:
        weight_map = {
            name: file.name for file, names in zip(files, shards, strict=True) for name in names
        }
        total = sum(4 * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _write_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape and tensor.dtype == torch.float32, name
            out.write(bytes_of(tensor))
