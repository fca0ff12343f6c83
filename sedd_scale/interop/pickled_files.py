"""Files of `torch.save`, read and written one tensor at a time; nothing in them is ever executed.

A file is opened as a tree whose tensors have shapes, types and offsets but no numbers; numbers are
read by offset when asked for. Writing reserves the room of every tensor first and fills it tensor
after tensor. (torch.load under a FakeTensorMode and torch.serialization.skip_data do the rest.)
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.checkpoint.files import READ_ERRORS
from sedd_scale.errors import CheckpointError


class PickledFile:
    """A file of `torch.save`.

    Attributes:
        path: the file.
        tree: what was saved, its tensors without their numbers.

    Raises:
        CheckpointError: the file is missing, damaged, or cannot be opened without running code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        # What torch wrote before 1.6 has no offsets and is read whole.
        self._is_whole = not zipfile.is_zipfile(path)
        try:
            self.tree: Any = _load_whole(path) if self._is_whole else _load_tree(path)
        except READ_ERRORS as error:
            reason = str(error).splitlines()[-1] if str(error) else type(error).__name__
            weights_only = [line for line in str(error).splitlines() if "Unsupported" in line]
            raise CheckpointError(
                f"{path} cannot be read as a file of torch.save holding tensors and plain values "
                f"({(weights_only or [reason])[0].strip()}); fetch it again, or save its state "
                "dicts alone"
            ) from None

    def read(self, tensor: Tensor) -> Tensor:
        """A tensor of the tree with its numbers, on the CPU, in its own type.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        if self._is_whole:
            return tensor
        offset = _offset_in_file(tensor)
        size, stride = tensor.shape, tensor.stride()
        if tensor.numel() == 0:
            return torch.empty(size, dtype=tensor.dtype)
        span = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        data = torch.empty(span, dtype=tensor.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset + int(tensor.storage_offset()) * tensor.element_size())
            if not read_into(file, data):
                raise CheckpointError(f"{self.path} is cut short; fetch it again")
        return data.as_strided(tuple(size), stride).contiguous()


def read_into(file: Any, data: Tensor) -> bool:
    """Fill a contiguous tensor with the file's next bytes; whether there were enough."""
    view = bytes_of(data)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            return False
        done += count
    return True


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in memory order; a view where the tensor is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _offset_in_file(tensor: Tensor) -> int:
    """Where the numbers of a tensor's storage begin in the file it was loaded from as a fake."""
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None
    return int(offset)


def placeholder(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor for the tree of `write_pickled`: shape and type, no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype)


def write_pickled(path: Path, tree: Any, numbers: dict[int, Callable[[], Tensor]]) -> None:
    """Write a tree as `torch.save` would, asking for one tensor's numbers at a time.

    Args:
        tree: plain values, lists and dictionaries, and tensors of `placeholder`.
        numbers: for the id() of each placeholder what gives its numbers.
    """
    from torch.serialization import skip_data

    with skip_data(materialize_fake_tensors=True):
        torch.save(tree, path)
    written = _load_tree(path)
    with path.open("r+b") as file:
        for ours, theirs in zip(tensors_in(tree), tensors_in(written), strict=True):
            tensor = numbers[id(ours)]()
            assert tensor.shape == theirs.shape and tensor.dtype == theirs.dtype
            if tensor.numel():
                file.seek(_offset_in_file(theirs))
                file.write(bytes_of(tensor))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested dictionaries and lists, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_in(value)


def size_in_bytes(tree: Any) -> int:
    """Bytes of all tensors of a tree."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors_in(tree))


def _load_whole(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_tree(path: Path) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _inert_classes(path), FakeTensorMode():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _inert_classes(path: Path) -> Iterator[None]:
    """Let the classes that a training program pickled beside its tensors become empty objects.

    Such as its configuration and its tokenizer: of no use here, and code that must not run.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    names = get_unsafe_globals_in_checkpoint(path)
    with safe_globals([(_inert_class(name), name) for name in names]):
        yield


def _inert_class(name: str) -> type:
    def new(cls: type, *_: Any, **__: Any) -> Any:
        # torch's unpickler puts items into plain dictionaries only.
        return {} if name == "collections.defaultdict" else object.__new__(cls)

    def ignore(*_: Any, **__: Any) -> None:
        """Whatever the object would have been filled with."""

    methods = {"__new__": new, "__init__": ignore, "__setstate__": ignore}
    return type("Inert", (), {**methods, "append": ignore, "extend": ignore})
