"""What a checkpoint is: its format, model, run and tensors, without reading its weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import CheckpointSource
from sedd_scale.interop.formats import open_checkpoint


@dataclass(frozen=True)
class Group:
    """Tensors that differ in their block alone.

    Attributes:
        name: with * in the place of the block's number.
        shape, dtype: of each.
        count: how many there are.
        num_bytes: of all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    num_bytes: int


def inspect(path: str | Path, assumptions: Assumptions | None = None) -> str:
    """A page of text on a checkpoint.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    return "\n".join(_lines(open_checkpoint(path, assumptions=assumptions)))


def group_tensors(source: CheckpointSource) -> list[Group]:
    """The tensors of a checkpoint, blocks taken together, in the order of the file."""
    groups: dict[tuple[str, tuple[int, ...], str], Group] = {}
    for name, shape, dtype, num_bytes in source.contents():
        words = name.split(".")
        starred = ".".join("*" if word.isdigit() and i else word for i, word in enumerate(words))
        if "blocks" not in words:
            starred = name
        key = (starred, shape, dtype)
        before = groups.get(key)
        groups[key] = Group(
            starred,
            shape,
            dtype,
            1 if before is None else before.count + 1,
            num_bytes if before is None else before.num_bytes + num_bytes,
        )
    return list(groups.values())


def _lines(source: CheckpointSource) -> Iterator[str]:
    described = source.described
    config, model = described.config, described.config.model
    num_parameters = sum(math.prod(shape) for shape in source.shapes.values())
    kept = {
        "master": "weights",
        "ema": "averages",
        "exp_avg": "first moments",
        "exp_avg_sq": "second moments",
    }
    holds = [word for key, word in kept.items() if key in source.holds]
    if not source.holds & {"exp_avg"} and len(holds) == 1:
        holds = ["weights of one kind"]
    yield f"path        {source.path}"
    yield f"format      {source.format}"
    yield f"holds       {', '.join(holds)}"
    if described.step or "exp_avg" in source.holds:
        yield f"step        {described.step}, {described.optimizer_step} updates of the optimizer"
    else:
        yield "step        not known"
    yield (
        f"model       {num_parameters:,} parameters: hidden_size {model.hidden_size}, num_layers "
        f"{model.num_layers}, num_heads {model.num_heads}, cond_dim {model.cond_dim}, mlp_ratio "
        f"{model.mlp_ratio}, rotary_base {model.rotary_base:g}"
    )
    yield f"graph       {config.graph.name}, {described.num_tokens} tokens"
    yield f"objective   {config.training.objective}"
    yield f"noise       {config.noise.name} ({described.noise_range})"
    yield (
        f"scores      scale_by_sigma {str(config.resolved_scale_by_sigma).lower()}, "
        f"time_conditioning {str(model.time_conditioning).lower()}, parametrisation "
        f"{model.parametrisation}"
    )
    yield f"length      {described.block_length}"
    tokenizer = described.tokenizer_directory
    yield f"tokenizer   {tokenizer if tokenizer is not None else 'none'}"
    if described.assumed:
        values = ", ".join(f"{flag} {value}" for flag, value in described.assumed.items())
        yield f"assumed     {values}"
    groups = group_tensors(source)
    count, num_bytes = sum(g.count for g in groups), sum(g.num_bytes for g in groups)
    yield f"tensors     {count}, {num_bytes:,} bytes"
    width = max(len(group.name) for group in groups)
    for group in groups:
        yield (
            f"  {group.name:{width}}  {group.count:4} x {list(group.shape)!s:16} {group.dtype:9} "
            f"{group.num_bytes:15,} bytes"
        )
