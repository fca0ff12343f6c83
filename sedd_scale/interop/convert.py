"""Conversion of checkpoints between our format and those of other programs.

A conversion reads all of its source, refuses what is not exactly the model it claims to be, writes
beside its destination under a temporary name and renames that when all of it is on disk.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from sedd_scale.errors import CheckpointError
from sedd_scale.interop.pretrained import load_pretrained
from sedd_scale.interop.published import INV_FREQ, published_config, to_published
from sedd_scale.model.parameters import LogicalParameter, logical_parameters
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.fragments import Fragment, ZeroFragments
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.training.checkpoint import find_checkpoint, save_checkpoint

# Published models have this ratio and no key for it.
PUBLISHED_MLP_RATIO = 4
ROTARY_BASE = 10_000.0
TOKENIZER_DIRECTORY = "tokenizer"


def convert(
    source_format: str,
    target_format: str,
    source: str | Path,
    target: str | Path,
    *,
    weights: str = "ema",
) -> None:
    """Write the model of `source` to `target` in another format.

    Args:
        source_format, target_format: native, sedd-hf, sedd-train or mdlm.
        weights: of a native source, "ema" or "master".

    Raises:
        CheckpointError: no such conversion, an unusable source, a format that cannot express the
            model, or a target that exists.
    """
    conversion = CONVERSIONS.get((source_format, target_format))
    if conversion is None:
        known = ", ".join(f"{a} to {b}" for a, b in CONVERSIONS)
        raise CheckpointError(
            f"there is no conversion from {source_format} to {target_format}; this version "
            f"converts {known}"
        )
    source, target = Path(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already: remove it or give another destination")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: directory {target.parent} does not exist; make it first")
    temporary = target.with_name(target.name + ".tmp")
    if temporary.exists():
        raise CheckpointError(
            f"{temporary} is in the way, left by another conversion: wait for it or remove it"
        )
    _check_kind(source, source_format)
    model = load_pretrained(source, device="cpu", weights=weights, layout=initialize_layout())
    tokenizer = _tokenizer_directory(source, source_format)
    try:
        conversion(model, temporary, tokenizer)
        temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_published(model: ScoreModel, directory: Path, tokenizer_directory: Path | None) -> None:
    """Write config.json, model.safetensors and the tokenizer into a new directory.

    Raises:
        CheckpointError: the published format cannot express the model.
    """
    from safetensors.torch import save_file

    config = model.config
    if config.model.mlp_ratio != PUBLISHED_MLP_RATIO:
        raise CheckpointError(
            f"model.mlp_ratio={config.model.mlp_ratio} cannot be written in the published format, "
            f"whose models all have {PUBLISHED_MLP_RATIO}"
        )
    if not config.model.time_conditioning:
        raise CheckpointError(
            "model.time_conditioning=false cannot be written in the published format, whose models "
            "are all conditioned on sigma"
        )
    if model.block_length is None:
        raise CheckpointError("the checkpoint does not name its block length")
    directory.mkdir()
    about = published_config(
        config, num_tokens=model.graph.num_tokens, block_length=model.block_length
    )
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    tensors = published_tensors(model)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if tokenizer_directory is not None:
        shutil.copytree(tokenizer_directory, directory / TOKENIZER_DIRECTORY)


def published_tensors(model: ScoreModel) -> dict[str, Tensor]:
    """Every tensor of the published format, the rotary frequencies included (one process)."""
    assert model.layout.tensor == 1
    logical = {
        p.name: p.parameter.detach() for p in logical_parameters(model.network, model.layout)
    }
    for parameter in logical_parameters(model.network, model.layout):
        assert parameter.local_shape == parameter.shape, f"{parameter.name} is padded"
    shape = model.config.model
    tensors = to_published(logical, num_layers=shape.num_layers, num_heads=shape.num_heads)
    even = torch.arange(0, model.config.head_dim, 2, dtype=torch.float32)
    tensors[INV_FREQ] = 1.0 / ROTARY_BASE ** (even / model.config.head_dim)
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def write_native(model: ScoreModel, directory: Path, tokenizer_directory: Path | None) -> None:
    """Write a run directory with the one checkpoint step-0.

    Its masters and its averages are the model's weights and its moments are zero: it can be
    evaluated and sampled from.
    """
    parameters = list(logical_parameters(model.network, model.layout))
    config = model.config.override(f"model.vocab_size={model.graph.num_tokens}")
    tokenizer = model.tokenizer
    directory.mkdir()
    save_checkpoint(
        directory,
        engine_fragments=cast(ZeroFragments, _WholeParameters(parameters)),
        parameters=parameters,
        layout=model.layout,
        meta={
            "step": 0,
            "samples_seen": 0,
            "tokens": 0,
            "config": config.to_dict(),
            "dataset_fingerprint": None,
            "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint,
            "num_tokens": model.graph.num_tokens,
            "block_length": model.block_length,
        },
        tokenizer_directory=tokenizer_directory,
        keep=0,
    )
    (directory / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")


class _WholeParameters:
    """Plain parameters in the place of an engine's fragments, as before a first step."""

    def __init__(self, parameters: Sequence[LogicalParameter]) -> None:
        self._names = {parameter.name for parameter in parameters}

    def ensure_state(self) -> None:
        """There is nothing to make."""

    def get_step(self) -> int:
        """No update was made."""
        return 0

    def get(self, parameter: LogicalParameter, key: str) -> Fragment:
        """The whole parameter, or zeros for a moment of it."""
        assert parameter.name in self._names, parameter.name
        flat = parameter.parameter.detach().float().contiguous().view(-1)
        return Fragment(flat if key in ("master", "ema") else torch.zeros_like(flat), 0)


def _tokenizer_directory(source: Path, source_format: str) -> Path | None:
    home = find_checkpoint(source) if source_format == "native" else source
    directory = home / TOKENIZER_DIRECTORY
    return directory if directory.is_dir() else None


def _check_kind(source: Path, source_format: str) -> None:
    is_published = (source / "config.json").is_file()
    if source_format == "native" and is_published:
        raise CheckpointError(f"{source} is in the published format: use --from sedd-hf")
    if source_format == "sedd-hf" and source.exists() and not is_published:
        raise CheckpointError(
            f"{source} has no config.json: give a directory in the published format"
        )


Writer = Callable[[ScoreModel, Path, Path | None], None]
CONVERSIONS: Mapping[tuple[str, str], Writer] = {
    ("sedd-hf", "native"): write_native,
    ("native", "sedd-hf"): write_published,
}
