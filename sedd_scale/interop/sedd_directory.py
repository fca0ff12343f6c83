"""Directories in the published format: config.json with safetensors files or pytorch_model.bin."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.config import Config
from sedd_scale.config.trunk import beyond_published
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.diffusion.objectives import ScoreEntropy
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.checkpoint_source import CheckpointSource, Description, model_shapes
from sedd_scale.interop.foreign_files import CONFIG_FILE
from sedd_scale.interop.model_card import CARD_FILE
from sedd_scale.interop.safetensors_files import DEFAULT_SHARD_BYTES, write_safetensors
from sedd_scale.interop.sedd_names import (
    INV_FREQ,
    PUBLISHED_MLP_RATIO,
    ROTARY_BASE,
    published_config,
    published_names,
    published_rows,
    rotary_frequencies,
)
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY

# Key, the one value that the published format has for it, and why.
_EXPRESSIBLE = (
    ("model.mlp_ratio", PUBLISHED_MLP_RATIO, f"models all have {PUBLISHED_MLP_RATIO}"),
    ("model.rotary_base", ROTARY_BASE, f"readers all turn by {ROTARY_BASE:g}"),
    ("model.time_conditioning", True, "models are all conditioned on sigma"),
    (
        "training.objective",
        ScoreEntropy.name,
        "readers take a network's outputs for scores as they are: train on with "
        "training.objective=score_entropy, from model.init_from",
    ),
    ("training.shift", False, "readers take outputs at a position for that position"),
    ("model.parametrisation", "score", "readers take a network's outputs for log-scores"),
)


def published_shapes(config: Config) -> dict[str, Shape]:
    """Shape of each published parameter of a model, in the order of the authors' modules."""
    shapes = model_shapes(config)
    return {
        theirs: shapes[ours] for theirs, ours in published_names(config.model.num_layers).items()
    }


def check_expressible(described: Description, *, fixed_mlp_ratio: bool = True) -> None:
    """Refuse a model that the authors' program and its formats have no words for.

    Raises:
        CheckpointError: names the key and its value.
    """
    for key, value, reason in _EXPRESSIBLE:
        found = described.config.value(key)
        if found != value and (fixed_mlp_ratio or key != "model.mlp_ratio"):
            raise CheckpointError(
                f"{key}={scalar_text(found)} cannot be written in the published format, whose "
                f"{reason}"
            )
    for key, value in beyond_published(described.config.model).items():
        raise CheckpointError(
            f"model.{key}={scalar_text(value)} cannot be written in the published format, whose "
            "networks all have one trunk"
        )
    if described.block_length is None:
        raise CheckpointError("the checkpoint does not name its block length")


def write_published_files(
    directory: Path,
    source: CheckpointSource,
    card: Callable[[], str],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write config.json, the averaged weights, the tokenizer and a card into a new directory.

    Args:
        card: gives the text of README.md, of a model that can be written.
        shard_bytes: largest size of one file's tensors.

    Raises:
        CheckpointError: the published format cannot express the model.
    """
    described = source.described
    check_expressible(described)
    config, block_length = described.config, described.block_length
    assert block_length is not None
    card_text = card()
    directory.mkdir()
    about = published_config(config, num_tokens=described.num_tokens, block_length=block_length)
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    names = published_names(config.model.num_layers)

    def read_published(theirs: str) -> Tensor:
        if theirs == INV_FREQ:
            return rotary_frequencies(config.trunk.head_dim)
        ours = names[theirs]
        return published_rows(ours, source.read(ours, "ema"), config.model.num_heads)

    shapes = published_shapes(config) | {INV_FREQ: (config.trunk.head_dim // 2,)}
    write_safetensors(directory, shapes, read_published, shard_bytes=shard_bytes)
    if described.tokenizer_directory is not None:
        shutil.copytree(described.tokenizer_directory, directory / TOKENIZER_DIRECTORY)
    (directory / CARD_FILE).write_text(card_text, encoding="utf-8")
