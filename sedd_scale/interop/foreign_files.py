"""The network within the files of any program, under the published names.

Programs wrap a network in modules, whose names come before those of its tensors or between them
(`backbone.`, `module.`, `_orig_mod.`), and in dictionaries (`state_dict`, `model`). The network is
where `vocab_embed.embedding` is; of two, such as weights and averages, each has its own place.
"""

import contextlib
import functools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.pickled_files import PickledFile
from sedd_scale.interop.safetensors_files import INDEX_FILE, SINGLE_FILE

CONFIG_FILE = "config.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = f"{PICKLED_FILE}.index.json"
# Of a directory, what holds its weights: the first that is there.
STANDARD_FILES = (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX)
TRAINING_FILE = "checkpoint.pth"
_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
# What programs keep beside weights in such files, by their names.
_BESIDE = re.compile(r"^\.|^training_args|^scheduler|^rng_state|^scaler|optim")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_ANCHOR = "vocab_embed.embedding"
_FLOATS = {"f64", "f32", "f16", "bf16", "float64", "float32", "float16", "bfloat16"}
_LFS = b"version https://git-lfs"
# Modules that hold another one and nothing else, by the name they give it.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


class Entry(NamedTuple):
    """A tensor of a file: its name there, shape, type and bytes, and what reads it."""

    name: str
    shape: Shape
    dtype: str
    num_bytes: int
    read: Callable[[], Tensor]


class Network(NamedTuple):
    """The tensors of a network by their published names; what stood before, but for wrappers'."""

    prefix: str
    tensors: Mapping[str, Entry]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of each tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}


class Weights(NamedTuple):
    """What a file holds: the weights, and averages of the same network where they have names too.

    Attributes:
        tree: all that a pickled file holds, beside its tensors; empty of others.
        file: the pickled file, to read more of it.
    """

    network: Network
    averages: Network | None
    tree: Mapping[str, Any]
    file: PickledFile | None


class CheckpointFiles:
    """What lies at a path, each file read once, when it is first asked for.

    Args:
        verify: hash every file of a checkpoint of ours when it is opened; sizes are always
            compared.

    Attributes:
        named: the path as it was given.
        path: of a file that is no checkpoint by itself, its directory.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.named, self.verify = Path(path), verify
        self.path = _described_path(self.named)

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """What config.json says; empty where there is none."""
        return read_json(self.path / CONFIG_FILE) if self.path.is_dir() else {}

    @functools.cached_property
    def weights(self) -> Path:
        """As of `weights_file`."""
        return weights_file(self.path)

    @functools.cached_property
    def pickled(self) -> PickledFile | None:
        """The file of weights, where it is one of torch.save."""
        file = self.weights
        is_other = file.name.endswith(".index.json") or is_safetensors(file)
        return None if is_other else PickledFile(file)


def _described_path(path: Path) -> Path:
    """The directory of a file that is no checkpoint by itself: its parts or its configuration."""
    named = path.name in (CONFIG_FILE, *STANDARD_FILES)
    for index in (INDEX_FILE, PICKLED_INDEX):  # one shard of several
        file = path.parent / index
        named = named or (file.is_file() and path.name in set(_weight_map(file).values()))
    is_described = (path.parent / CONFIG_FILE).is_file() or path.name.endswith(".index.json")
    return path.parent if path.is_file() and named and is_described else path


def weights_file(path: Path) -> Path:
    """The file with the weights, or their index: `path` itself, or the one that it holds.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint")
    for name in (*STANDARD_FILES, TRAINING_FILE, f"checkpoints-meta/{TRAINING_FILE}"):
        if (path / name).exists():
            return path / name
    for folder in (path, path / "checkpoints"):
        found = _weights_in(folder, "*")
        if found and _SHARD.search(found[0].name):
            raise CheckpointError(
                f"{folder} is incomplete: {found[0].name} is a part of the weights, and the index "
                f"({INDEX_FILE} or {PICKLED_INDEX}) is missing: fetch it too"
            )
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:4]) + (", ..." if len(found) > 4 else "")
            raise CheckpointError(f"{folder} holds several checkpoints ({names}): name one of them")
        if found:
            return found[0]
    if deeper := _weights_in(path, "*/*") + _weights_in(path, "*/*/*"):
        raise CheckpointError(f"{path} holds no checkpoint itself: name one in it, as {deeper[0]}")
    raise CheckpointError(
        f"{path} holds no checkpoint: neither a run's checkpoints/step-N nor weights, such as "
        f"{SINGLE_FILE}, {PICKLED_FILE}, {TRAINING_FILE} or a .ckpt"
    )


def _weights_in(folder: Path, pattern: str) -> list[Path]:
    found = sorted(p for p in folder.glob(pattern) if p.suffix in _SUFFIXES and p.is_file())
    return [p for p in found if not _BESIDE.search(p.name)]


def is_safetensors(file: Path) -> bool:
    """Whether a file is of safetensors, whatever its name: a header of JSON behind 8 bytes.

    Raises:
        CheckpointError: it is what git leaves of a large file.
    """
    with file.open("rb") as stream:
        head = stream.read(len(_LFS))
    if head == _LFS:
        raise CheckpointError(f"{file} is a pointer of Git LFS, not the file: run `git lfs pull`")
    return head[8:9] == b"{" or (file.suffix == ".safetensors" and not zipfile.is_zipfile(file))


def open_weights(files: CheckpointFiles, assumptions: Assumptions) -> Weights:
    """The network of a file, or of the shards that an index names; nothing is read yet.

    Args:
        assumptions: of which `network` says which is meant, where a file holds several.

    Raises:
        CheckpointError: a file is missing or damaged, holds no network, or several.
    """
    file, pickled = files.weights, files.pickled
    tree: Mapping[str, Any] = {}
    if pickled is not None:
        tree = pickled.tree if isinstance(pickled.tree, dict) else {}
        groups = dict(_state_dicts(pickled, pickled.tree, "", set()))
    else:
        groups = {"": open_tensors(files)}
    networks: dict[str, Network] = {}
    for place, entries in groups.items():
        for network in _networks(file, entries):
            networks[place + network.prefix] = network
    choice = assumptions.network
    if choice is not None:
        chosen = {
            place: network
            for place, network in networks.items()
            if place.startswith(choice) or network.prefix.startswith(choice)
        }
        if not chosen:
            raise CheckpointError(
                f"{file} holds no network {choice!r}: it holds {_listed(networks) or 'none'}"
            )
        networks = chosen
    if not networks:
        names = sorted(name for entries in groups.values() for name in entries)
        raise CheckpointError(
            f"{file} is not a SEDD network: missing {_ANCHOR} [V, H]; it holds "
            f"{', '.join(names[:3]) or 'no tensors (save arrays of numpy as tensors)'}"
        )
    averages = [place for place in networks if "ema" in place.replace("_", ".").split(".")]
    others = [place for place in networks if place not in averages]
    if len(averages) > 1 or len(others) > 1:
        raise CheckpointError(
            f"{file} holds several networks ({_listed(networks)}): say which with "
            f"{assumptions.spelled(network=None)}"
        )
    network = networks[(others or averages)[0]]
    check_floats(file, network.tensors.values())
    return Weights(network, networks[averages[0]] if averages and others else None, tree, pickled)


def check_floats(file: Path, entries: Iterable[Entry]) -> None:
    """Refuse tensors that are not of floating-point numbers; raises CheckpointError."""
    for entry in entries:
        if entry.dtype.lower() not in _FLOATS:
            raise CheckpointError(
                f"{file}: {entry.name} is {entry.dtype}, quantised or sparse: give the weights it "
                "was made of"
            )


def open_tensors(files: CheckpointFiles) -> dict[str, Entry]:
    """The tensors of a file, or of the shards that an index names, by their names there.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    file, pickled = files.weights, files.pickled
    if pickled is not None:
        return _entries(pickled, pickled.tree if isinstance(pickled.tree, dict) else {})
    return (_sharded if file.name.endswith(".index.json") else _safetensors)(file)


def _listed(networks: Mapping[str, Network]) -> str:
    return ", ".join(repr(place) for place in networks)


def read_json(file: Path) -> Mapping[str, Any]:
    """A configuration in JSON; empty where there is no such file.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch the file again") from None
    return raw if isinstance(raw, dict) else {}


def _networks(file: Path, entries: Mapping[str, Entry]) -> Iterator[Network]:
    """The networks among tensors, each with what stands behind its prefix."""
    stripped: dict[str, Entry] = {}
    for name, entry in entries.items():
        if not entry.shape:  # a counter of a wrapper's
            continue
        bare = ".".join(word for word in name.split(".") if word not in _WRAPPERS)
        if bare in stripped and bare.endswith(_ANCHOR):
            raise CheckpointError(
                f"{file} holds the same network twice, as {stripped[bare].name} and {name}: save "
                "one of them alone"
            )
        stripped[bare] = entry
    ends = [name.removesuffix(_ANCHOR) for name in stripped if f".{name}".endswith(f".{_ANCHOR}")]
    for prefix in ends:
        inner = tuple(other for other in ends if len(other) > len(prefix))
        yield Network(
            prefix,
            {
                name.removeprefix(prefix): entry
                for name, entry in stripped.items()
                if name.startswith(prefix) and not (inner and name.startswith(inner))
            },
        )


def _state_dicts(
    pickled: PickledFile, tree: Any, place: str, seen: set[int]
) -> Iterator[tuple[str, dict[str, Entry]]]:
    """The dictionaries of a tree that hold tensors, and where they are."""
    if not isinstance(tree, dict | list | tuple) or id(tree) in seen:  # which may hold each other
        return
    seen.add(id(tree))
    tree = tree if isinstance(tree, dict) else dict(enumerate(tree))
    entries = _entries(pickled, tree)
    if entries:
        yield place, entries
    for name, value in tree.items():
        if name != "optimizer":
            yield from _state_dicts(pickled, value, f"{place}{name}.", seen)


def _entries(pickled: PickledFile, state: Mapping[Any, Any]) -> dict[str, Entry]:
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: entry_of(pickled, name, tensor) for name, tensor in tensors.items()}


def entry_of(pickled: PickledFile | None, name: str, tensor: Tensor) -> Entry:
    """The entry of a tensor in the tree of a pickled file."""
    assert pickled is not None
    dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
    if tensor.layout != torch.strided:
        dtype = str(tensor.layout).removeprefix("torch.")
    num_bytes = math.prod(shape) * tensor.element_size()
    return Entry(name, shape, dtype, num_bytes, lambda: pickled.read(tensor))


def _safetensors(file: Path) -> dict[str, Entry]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        kinds = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

    def entry(name: str, shape: Shape, dtype: str) -> Entry:
        bits = re.search(r"\d+", dtype)  # of BOOL none
        num_bytes = math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
        return Entry(name, shape, dtype, num_bytes, lambda: _read_safetensors(file, name))

    return {name: entry(name, *kind) for name, kind in kinds.items()}


def _read_safetensors(file: Path, name: str) -> Tensor:
    with _opened(file) as opened:  # anew each time: nothing of the file stays in memory
        tensor: Tensor = opened.get_tensor(name)
        return tensor


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); fetch it again") from None


def _sharded(index: Path) -> dict[str, Entry]:
    """The tensors of the shards that an index names."""
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    found: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise CheckpointError(f"{index.parent} is incomplete: {name} is missing")
        if is_safetensors(shard):
            own = _safetensors(shard)
        else:
            pickled = PickledFile(shard)
            own = _entries(pickled, pickled.tree if isinstance(pickled.tree, dict) else {})
        for tensor in own:
            if tensor in found:
                raise CheckpointError(
                    f"{tensor} is both in {found[tensor]} and in {name} of {index.parent}"
                )
            found[tensor] = name
        entries.update(own)
    wrong = sorted(set(weight_map.items()) ^ set(found.items()))
    if wrong:
        tensor = wrong[0][0]
        raise CheckpointError(
            f"{index} and the shards beside it disagree about the file of {tensor} "
            f"({weight_map.get(tensor, 'none')} and {found.get(tensor, 'none')}); fetch them again"
        )
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} is not an index of files of weights: it has no weight_map")
    index = {str(name): str(file) for name, file in weight_map.items()}
    outside = [name for name in index.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{path} names {outside[0]}, which is not a file beside it")
    return index
