"""safetensors files, one or many with an index, read and written one tensor at a time.

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

from sedd_scale.errors import CheckpointError
from sedd_scale.interop.pickled_files import bytes_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000

# Bytes of a number of each type, as a header names it.
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1}


class SafetensorsFiles:
    """The tensors of one safetensors file, or of the shards that an index names.

    Attributes:
        files: the files they are in.
        shapes: of each tensor.

    Raises:
        CheckpointError: a file is missing or damaged, or the index does not tell what they hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        weight_map = _read_index(path) if path.name.endswith(".index.json") else None
        names = {path.name} if weight_map is None else set(weight_map.values())
        self.files = [path.parent / name for name in sorted(names)]
        for file in self.files:
            self._open(file)
        if weight_map is not None:
            found = {name: file.name for name, file in self._file_of.items()}
            wrong = sorted(set(weight_map.items()) ^ set(found.items()))
            if wrong:
                name = wrong[0][0]
                raise CheckpointError(
                    f"{path} and the shards beside it disagree about the file of {name} "
                    f"({weight_map.get(name, 'none')} and {found.get(name, 'none')}); fetch them "
                    "again"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, in its own type; nothing of the file stays in memory when it is dropped."""
        from safetensors import SafetensorError, safe_open

        file = self._file_of[name]
        try:
            with safe_open(file, "pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); fetch it again") from None

    def _open(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        if not file.is_file():
            raise CheckpointError(f"{self.path.parent} is incomplete: {file.name} is missing")
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
                    if name in self._file_of:
                        raise CheckpointError(
                            f"{name} is both in {self._file_of[name].name} and in {file.name} of "
                            f"{file.parent}"
                        )
                    part = opened.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype()
                    self._file_of[name] = file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); fetch it again") from None


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files ({error})") from None
    outside = [name for name in index.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]}, which is not a file beside it")
    return index


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
