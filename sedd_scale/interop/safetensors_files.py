"""safetensors files, one or many with an index, written one tensor at a time.

The layout of a file, public and simple: the length of a JSON header as 8 little-endian bytes, the
header (name to dtype, shape and data_offsets), the tensors' bytes one after the other. A model of
several files has `model.safetensors.index.json`, whose `weight_map` says which file holds what.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sedd_scale.interop.pickled_files import bytes_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
# Types of numbers as such files name them, by torch's names.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_TYPES = {short: getattr(torch, name) for name, short in DTYPES.items()}


def write_safetensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtypes: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as model.safetensors, or as shards and their index.

    Args:
        shapes: of every tensor, in the order in which they are written.
        read: gives one tensor; asked once for each, and the answer is dropped when written.
        shard_bytes: largest size of a file's tensors; a larger tensor has a file of its own.
        dtypes: of each tensor, one of the values of `DTYPES`; None: all are float32.
    """
    dtypes = dtypes or dict.fromkeys(shapes, "F32")
    sizes = {name: _TYPES[dtypes[name]].itemsize * math.prod(shapes[name]) for name in shapes}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    numbered = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = [directory / name for name in (numbered if count > 1 else [SINGLE_FILE])]
    for file, names in zip(files, shards, strict=True):
        _write_file(file, {name: shapes[name] for name in names}, read, dtypes)
    if count > 1:
        weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    dtypes: Mapping[str, str],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _TYPES[dtypes[name]].itemsize * math.prod(shape)
        header[name] = {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape and tensor.dtype == torch.float32, name
            out.write(bytes_of(tensor.to(_TYPES[dtypes[name]])))
