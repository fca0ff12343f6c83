"""How many parameters a model has: by part, by pipeline stage and on one tensor-parallel rank.

The shapes are those of sedd_scale/model, in the order in which its modules register them: ZeRO cuts
the flattened parameters of a rank in that order.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sedd_scale.config import Config
from sedd_scale.config.trunk import Matrix

SIGMA_FEATURES = 256

Layer = tuple["ParameterShape", ...]


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of the whole network.

    Attributes:
        name: the layout-free name.
        part: what it belongs to in a table for people.
        shape: the whole tensor's shape, without padding.
        split_dim: the axis that tensor parallelism splits, or None where ranks hold copies.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    split_dim: int | None = None

    @property
    def numel(self) -> int:
        """Numbers in the whole tensor."""
        return math.prod(self.shape)

    def local_numel(self, tensor: int) -> int:
        """Numbers one of `tensor` ranks holds, the padding of vocabulary shards included."""
        if self.split_dim is None:
            return self.numel
        length = self.shape[self.split_dim]
        return self.numel // length * -(-length // tensor)


def num_states(config: Config, vocab_size: int) -> int:
    """V, the states of a position: the N real tokens, and the mask under absorb."""
    return vocab_size + config.graph.facts.has_mask


def layer_shapes(config: Config, vocab_size: int) -> list[Layer]:
    """The parameters of each layer of the list that a pipeline cuts: embedding, blocks, head."""
    model, trunk = config.model, config.trunk
    width, cond = model.hidden_size, model.cond_width
    states = num_states(config, vocab_size)

    def modulation(layer: str, num_vectors: int) -> Iterator[ParameterShape]:
        rows = num_vectors * width
        if cond:
            yield ParameterShape(f"{layer}.modulation.linear.weight", "modulation", (rows, cond))
            yield ParameterShape(f"{layer}.modulation.linear.bias", "modulation", (rows,))

    def norm(name: str) -> Iterator[ParameterShape]:
        yield ParameterShape(f"{name}.weight", "norms", (width,))
        if trunk.norm_bias:
            yield ParameterShape(f"{name}.bias", "norms", (width,))

    def matrices(block: str, module: Iterable[Matrix]) -> Iterator[ParameterShape]:
        """Weights, then biases: split with its rows, and whole where columns are."""
        biases = []
        for matrix in module:
            full, part, split_dim = f"{block}.{matrix.name}", matrix.part, matrix.split_dim
            shape = (matrix.rows, matrix.columns)
            yield ParameterShape(f"{full}.weight", part, shape, split_dim)
            if matrix.has_bias:
                split = None if split_dim else 0
                biases.append(ParameterShape(f"{full}.bias", part, shape[:1], split))
        yield from biases

    def block(index: int) -> Iterator[ParameterShape]:
        name = f"blocks.{index}"
        yield from norm(f"{name}.norm1")
        yield from norm(f"{name}.norm2")
        yield from modulation(name, 6)
        for of in ("q_norm", "k_norm") if trunk.qk_norm else ():
            yield ParameterShape(f"{name}.attention.{of}.weight", "norms", (trunk.head_dim,))
        for _, its in itertools.groupby(trunk.matrices, lambda matrix: matrix.module):
            yield from matrices(name, its)

    def embedding() -> Iterator[ParameterShape]:
        yield ParameterShape("embedding.tokens.weight", "token embedding", (states, width), 0)
        if model.positions == "learned":
            assert model.max_positions is not None
            shape = (model.max_positions, width)
            yield ParameterShape("embedding.positions.weight", "position embedding", shape)
        for name, columns in (("linear1", SIGMA_FEATURES), ("linear2", cond)):
            weight = f"embedding.sigma.{name}"
            if cond:
                yield ParameterShape(f"{weight}.weight", "noise embedding", (cond, columns))
                yield ParameterShape(f"{weight}.bias", "noise embedding", (cond,))

    def head() -> Iterator[ParameterShape]:
        yield from norm("head.norm")
        yield from modulation("head", 2)
        if not model.tied_embedding:
            yield ParameterShape("head.linear.weight", "head", (states, width), 0)
        if model.head_bias:
            yield ParameterShape("head.linear.bias", "head", (states,), 0)

    blocks = [tuple(block(index)) for index in range(model.num_layers)]
    return [tuple(embedding()), *blocks, tuple(head())]


def count_by_part(layers: list[Layer]) -> dict[str, int]:
    """Parameters of each part of the whole network, without padding."""
    counts: dict[str, int] = {}
    for layer in layers:
        for parameter in layer:
            counts[parameter.part] = counts.get(parameter.part, 0) + parameter.numel
    return counts


def stage_bounds(num_layers: int, pipeline: int) -> list[int]:
    """Where each stage begins in a list of `num_layers` layers, and the end; the first stages
    are the longer ones.

    Source: DeepSpeed's partition method "uniform" (deepspeed.runtime.utils.partition_uniform).
    """
    base, longer = divmod(num_layers, pipeline)
    return [stage * base + min(stage, longer) for stage in range(pipeline + 1)]
