"""One face for every checkpoint: a described model whose tensors are read one at a time.

Names, shapes and row order are ours, whatever the file's are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.config import Config
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.foreign_files import CheckpointFiles
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout
from sedd_scale.planning.parameters import layer_shapes
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY

# The tensors that a run keeps of each parameter, as its checkpoints name them.
WEIGHTS = ("ema", "master")


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model and of the run that made it.

    Attributes:
        config: with `model.vocab_size` and, where it is known, `data.block_length` filled in.
        block_length: L, or None if unknown.
        step: steps of the run; 0 if unknown.
        optimizer_step: updates of the optimizer.
        tokens: tokens of text seen.
        tokenizer_directory: where `open_tokenizer` finds the tokenizer that lies with it, if any.
        assumed: what nothing says and was taken for granted: the field of `Assumptions`, and the
            value.
        details: what only this format knows and its writer wants back, of plain JSON types.
    """

    config: Config
    block_length: int | None
    step: int = 0
    optimizer_step: int = 0
    tokens: int = 0
    tokenizer_directory: Path | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """N, without the mask."""
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    @property
    def noise_range(self) -> str:
        """What the schedule runs over, in words."""
        noise = self.config.noise
        if noise.name == "geometric":
            return f"sigma {noise.sigma_min:g} to {noise.sigma_max:g}"
        return f"eps {noise.eps:g}"


class CheckpointSource(ABC):
    """An open checkpoint, found complete: every tensor is there and has the shape it must have.

    Attributes:
        path: what was opened.
        described: the model and the run.
        holds: which of `STATE_KEYS` the file has; one kind of weights serves as the other.
    """

    format: str
    path: Path
    described: Description
    holds: frozenset[str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every parameter."""
        return model_shapes(self.described.config)

    def read(self, name: str, key: str) -> Tensor:
        """One tensor of one parameter, whole, float32, on the CPU; zeros where no moments are kept.

        Args:
            name: the parameter's logical name.
            key: of `STATE_KEYS`.
        """
        if key not in self.holds:
            if key not in WEIGHTS:
                return torch.zeros(self.shapes[name])
            (key,) = self.holds & set(WEIGHTS)
        return self._read(name, key).float()

    @abstractmethod
    def _read(self, name: str, key: str) -> Tensor:
        """The tensor `key` of a parameter, which the file has, in our row order."""

    @torch.no_grad()
    def load(self, parameters: Iterable[LogicalParameter], layout: Layout, weights: str) -> None:
        """Fill this process's shards of a model's parameters with "ema" or "master" weights."""
        for logical in parameters:
            assert logical.shard is not None
            logical.shard.copy_(logical.slice_of(self.read(logical.name, weights)))

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the file has them."""
        return [(name, shape, "float32", 4 * prod(shape)) for name, shape in self.shapes.items()]


class FileSource(CheckpointSource):
    """A checkpoint in files, of a format in `FORMATS`.

    Args:
        files: of which it says that they are its own.
        assumptions: what they do not say.

    Raises:
        CheckpointError: they are not exactly the model they describe.
    """

    @abstractmethod
    def __init__(self, files: CheckpointFiles, assumptions: Assumptions) -> None: ...

    @staticmethod
    @abstractmethod
    def claims(files: CheckpointFiles) -> bool:
        """Whether files that no format before it claims look like its own; none is read twice.

        Raises:
            CheckpointError: they look like two formats, or there are none.
        """


class WeightsOnly(CheckpointSource):
    """The weights of another source as a run that has yet to begin."""

    def __init__(self, source: CheckpointSource, weights: str) -> None:
        self.format = source.format
        self.path = source.path
        self.described = replace(source.described, step=0, optimizer_step=0, tokens=0, details={})
        self.holds = frozenset({"ema"})
        self._source, self._weights = source, weights

    def _read(self, name: str, key: str) -> Tensor:
        return self._source.read(name, self._weights)


def tokenizer_in(directory: Path) -> Path | None:
    """The tokenizer that a checkpoint's directory carries, if any."""
    tokenizer = directory / TOKENIZER_DIRECTORY
    return tokenizer if tokenizer.is_dir() else None


def model_shapes(config: Config) -> dict[str, Shape]:
    """Shape of every parameter of a model whose `model.vocab_size` is known."""
    assert config.model.vocab_size is not None
    layers = layer_shapes(config, config.model.vocab_size)
    return {parameter.name: parameter.shape for layer in layers for parameter in layer}
