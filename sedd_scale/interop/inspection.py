"""What a checkpoint is: its format, model, run and tensors, without reading its weights."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from sedd_scale.arrays import Shape
from sedd_scale.config.trunk import beyond_published
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import CheckpointSource
from sedd_scale.interop.formats import open_checkpoint

_KEPT = dict(master="weights", ema="averages", exp_avg="first moments", exp_avg_sq="second moments")


def inspect(path: str | Path, assumptions: Assumptions | None = None) -> str:
    """A page of text on a checkpoint.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    return "\n".join(_lines(open_checkpoint(path, assumptions=assumptions)))


def _lines(source: CheckpointSource) -> Iterator[str]:
    described = source.described
    config, model = described.config, described.config.model
    num_parameters = sum(math.prod(shape) for shape in source.shapes.values())
    keys = {key: word for key, word in _KEPT.items() if key in source.holds}
    holds = list(keys.values()) if len(keys) > 1 else ["weights of one kind"]
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
    others = (f"{key} {scalar_text(value)}" for key, value in beyond_published(model).items())
    yield f"trunk       {', '.join(others) or 'as published'}"
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
        yield f"assumed     {Assumptions().spelled(**described.assumed)}"
    groups: dict[tuple[str, Shape, str], list[int]] = {}  # by name (* for the block)
    for name, shape, dtype, num_bytes in source.contents():
        starred = re.sub(r"(\bblocks\.(?:\w+\.)*?)\d+\.", r"\1*.", name, count=1)
        groups.setdefault((starred, shape, dtype), []).append(num_bytes)
    sizes = [size for group in groups.values() for size in group]
    yield f"tensors     {len(sizes)}, {sum(sizes):,} bytes"
    width = max(len(name) for name, _, _ in groups)
    for (name, shape, dtype), group in groups.items():
        yield (
            f"  {name:{width}}  {len(group):4} x {list(shape)!s:16} {dtype:9} "
            f"{sum(group):15,} bytes"
        )
