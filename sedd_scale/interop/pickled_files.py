"""Files of `torch.save`, read and written one tensor at a time; nothing in them is ever executed.

A file is opened as a tree whose tensors have shapes, types and offsets but no numbers, which are
read when asked for. Writing reserves the room of every tensor first and fills it tensor after
tensor. (torch.load under a FakeTensorMode and torch.serialization.skip_data do the rest.)

What else was pickled is of classes that are not here, and whose code must not run: an unpickler
that knows the names of tensors alone gives an `Inert` object in the place of each.
"""

import pickle
import types
import warnings
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
        CheckpointError: the file is missing, damaged, or a program of TorchScript.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        # What torch wrote before 1.6 has no offsets and is read whole.
        self._is_whole = not zipfile.is_zipfile(path)
        try:
            self.tree: Any = _load(path) if self._is_whole else _load_tree(path)
        except READ_ERRORS as error:
            reason = (
                str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
            )
            raise CheckpointError(
                f"{path} cannot be read as a file of torch.save ({reason}); fetch it again, or "
                "save its state dict alone"
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
        with self.path.open("rb") as file:
            file.seek(offset + int(tensor.storage_offset()) * tensor.element_size())
            if file.readinto(bytes_of(data)) < span * data.element_size():
                raise CheckpointError(f"{self.path} is cut short; fetch it again")
        return data.as_strided(tuple(size), stride).contiguous()


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in memory order; a view where the tensor is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _offset_in_file(tensor: Tensor) -> int:
    """Where the numbers of a tensor's storage begin in the file it was loaded from as a fake."""
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise CheckpointError("a tensor was saved without its numbers (on the meta device)")
    return int(offset)


def placeholder(shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor for the tree of `write_pickled`: its shape, and no numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, dtype=torch.float32)


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


class Inert(dict[Any, Any]):
    """What stands for an object of a class that is not here: it does nothing, and keeps its data.

    Attributes:
        state: what the object was filled with, if anything; items of a mapping are its own.
    """

    state: Any
    dump_patches = False  # torch asks where a whole module was pickled

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """An empty one, whatever the arguments; it is also what a call of one gives."""
        made = super().__new__(cls)
        made.state = None
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        """An empty one."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None:
        """Of a list, which keeps nothing."""

    def extend(self, _: Any) -> None:
        """Of a list."""

    add = append


def plain(value: Any, depth: int = 10) -> Any:
    """Plain values of a tree: configurations of OmegaConf, whose objects are not here, included.

    Args:
        depth: how far in, as objects may hold each other.
    """
    if isinstance(value, Inert) and not value:
        state = value.state if isinstance(value.state, dict) else {}
        inner = [state[key] for key in ("_content", "_val") if key in state]
        value = inner[0] if inner else state
    if isinstance(value, dict | list | tuple) and depth:
        if isinstance(value, dict):
            return {str(name): plain(item, depth - 1) for name, item in value.items()}
        return [plain(item, depth - 1) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


class _Unpickler(pickle.Unpickler):
    """Knows what torch itself lets a file of weights name; every other name is `Inert`."""

    def find_class(self, module: str, name: str) -> Any:
        """Never imports anything."""
        from torch._weights_only_unpickler import _get_allowed_globals

        return _get_allowed_globals().get(f"{module}.{name}", Inert)


# What torch.load takes for the module `pickle`.
_PICKLE: Any = types.SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def _load(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch.load would run them.
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a program of TorchScript")
    # As a stream: of a path, torch looks at the suffix.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of classes whose source has changed
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


def _load_tree(path: Path) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _load(path)
