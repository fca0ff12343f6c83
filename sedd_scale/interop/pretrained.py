"""One door to every checkpoint that can be run: our own and those of other programs."""

import tempfile
from functools import partial
from pathlib import Path

import torch

from sedd_scale.errors import CheckpointError
from sedd_scale.files.atomic import refuse_existing_output
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.model_card import model_card
from sedd_scale.interop.model_source import ModelSource
from sedd_scale.interop.native import write_native_run
from sedd_scale.interop.sedd_directory import write_published_files
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import Layout, initialize_layout
from sedd_scale.tokenizers.opening import open_tokenizer


def load_pretrained(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    weights: str = "ema",
    layout: Layout | None = None,
    assumptions: Assumptions | None = None,
) -> ScoreModel:
    """Read a model, ready for `log_score`, `loss`, sampling and evaluation (in eval mode).

    Args:
        path: of any format: a run or one of its checkpoints, or a file or directory of weights.
        device: where the weights go; the GPU of this process where there is one.
        dtype: the weights' type.
        weights: where there are both, "ema" or "master" (the weights under training).
        layout: tensor-parallel layout; one process by default.
        assumptions: what a checkpoint of another program does not say.

    Raises:
        CheckpointError: nothing readable there, or parameters missing, unknown or misshapen.
    """
    layout = layout or initialize_layout()
    source = open_checkpoint(path, assumptions=assumptions)
    described = source.described
    directory = described.tokenizer_directory
    model = ScoreModel(
        described.config,
        described.num_tokens,
        layout,
        block_length=described.block_length,
        tokenizer=None if directory is None else open_tokenizer(directory),
    )
    source.load(logical_parameters(model.network, layout), layout, weights)
    return model.to(device=device or layout.device, dtype=dtype).eval()


def save_pretrained(model: ScoreModel, directory: str | Path, *, format: str = "sedd-hf") -> None:
    """Write a model of this process, and its tokenizer, into a new directory.

    Args:
        model: of `load_pretrained` or `new_model`; its weights are stored as float32.
        format: "sedd-hf", the published one, or "native": a run directory, which any objective can
            be written as, and which `model.init_from` and every tool take as well.

    Raises:
        CheckpointError: the directory exists, or the format cannot express the model.
    """
    directory = Path(directory)
    refuse_existing_output(directory, "", CheckpointError)
    if format not in ("native", "sedd-hf"):
        raise CheckpointError(f"format {format!r} is unknown: give native or sedd-hf")
    with tempfile.TemporaryDirectory() as files:
        tokenizer_directory = None
        if model.tokenizer is not None:
            model.tokenizer.save(files)
            tokenizer_directory = Path(files)
        source = ModelSource(model, tokenizer_directory)
        if format == "native":
            write_native_run(source, directory)
        else:
            card = partial(model_card, directory.name, source.described, ())
            write_published_files(directory, source, card)
