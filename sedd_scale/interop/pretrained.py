"""One door to every checkpoint that can be run: the published format and our own."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sedd_scale.data.tokenizers import Tokenizer, load_tokenizer
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.published import (
    INV_FREQ,
    published_names,
    read_published_config,
    read_published_tensors,
    to_logical,
    to_published,
)
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import Layout, initialize_layout


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    weights: str = "ema",
    layout: Layout | None = None,
) -> ScoreModel:
    """Read a model, ready for `log_score`, `loss`, sampling and evaluation (in eval mode).

    Args:
        path: a directory in the published format (config.json with model.safetensors or
            pytorch_model.bin), or a run directory, checkpoints folder or step folder of ours.
        device: where the weights go; the GPU of this process where there is one.
        dtype: the weights' type.
        weights: of our own checkpoints, "ema" or "master" (the weights under training).
        layout: tensor-parallel layout; one process by default.

    Raises:
        CheckpointError: nothing readable there, or parameters missing, unknown or misshapen.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint directory")
    layout = layout or initialize_layout()
    if (path / "config.json").exists():
        model = _load_published(path, layout)
    else:
        model = _load_native(path, layout, weights=weights)
    return model.to(device=device or layout.device, dtype=dtype).eval()


def _load_native(path: Path, layout: Layout, *, weights: str) -> ScoreModel:
    from sedd_scale.config import config_from_dict
    from sedd_scale.training.checkpoint import find_checkpoint, load_weights, read_meta

    step_directory = find_checkpoint(path)
    meta = read_meta(step_directory)
    model = ScoreModel(
        config_from_dict(meta["config"]),
        meta["num_tokens"],
        layout,
        block_length=meta["block_length"],
        tokenizer=_tokenizer_in(step_directory),
    )
    parameters = list(logical_parameters(model.network, layout))
    load_weights(step_directory, parameters, layout, weights=weights)
    return model


def _load_published(path: Path, layout: Layout) -> ScoreModel:
    config = read_published_config(path)
    num_tokens = config.model.vocab_size
    assert num_tokens is not None
    model = ScoreModel(
        config,
        num_tokens,
        layout,
        block_length=config.data.block_length,
        tokenizer=_tokenizer_in(path),
    )
    tensors = read_published_tensors(path)
    check_published_tensors(model, tensors, path)
    logical = to_logical(tensors, num_heads=config.model.num_heads)
    with torch.no_grad():
        for parameter in logical_parameters(model.network, layout):
            parameter.parameter.copy_(parameter.slice_of(logical[parameter.name].float()))
    return model


def _tokenizer_in(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer that a checkpoint's directory carries, if any."""
    directory = checkpoint / "tokenizer"
    return load_tokenizer(directory) if directory.is_dir() else None


def check_published_tensors(model: ScoreModel, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse a set of published tensors that is not exactly this model's.

    Raises:
        CheckpointError: names that are missing or unknown, or shapes that differ.
    """
    names = published_names(model.config.model.num_layers)
    missing = sorted(set(names) - set(tensors))
    unknown = sorted(set(tensors) - set(names) - {INV_FREQ})
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not hold the model of its config.json: missing "
            f"{_few(missing)}; unknown {_few(unknown)}"
        )
    shapes = published_shapes(model)
    for name in names:
        if tuple(tensors[name].shape) != shapes[name]:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, but its config.json "
                f"asks for {shapes[name]}"
            )


def published_shapes(model: ScoreModel) -> dict[str, tuple[int, ...]]:
    """Shape of each published tensor of this model (the row order changes no shape)."""
    logical = {p.name: p.shape for p in logical_parameters(model.network, model.layout)}
    return {
        theirs: logical[ours]
        for theirs, ours in published_names(model.config.model.num_layers).items()
    }


def published_gradients(model: ScoreModel) -> dict[str, Tensor]:
    """The parameters' gradients under the published names (one process)."""
    assert model.layout.tensor == 1
    gradients = {}
    for parameter in logical_parameters(model.network, model.layout):
        assert parameter.parameter.grad is not None, f"{parameter.name} has no gradient yet"
        gradients[parameter.name] = parameter.parameter.grad
    config = model.config.model
    return to_published(gradients, num_layers=config.num_layers, num_heads=config.num_heads)


def _few(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
