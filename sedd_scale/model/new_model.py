"""A fresh model for a plain PyTorch loop: `sedd_scale.new_model`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sedd_scale.config import Config, load_config
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.tokenizers.base import Tokenizer


def new_model(
    config: Config | str | Path,
    tokenizer: Tokenizer,
    *,
    block_length: int | None = None,
    overrides: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> ScoreModel:
    """An untrained model of this one process, in eval mode; no engine, no trainer.

    `model.loss(tokens_BL)` gives the training loss in nats of each sequence, [B], with a gradient;
    every parameter is in `model.parameters()`, float32. Two models of one configuration and seed
    start from the same weights.

    Args:
        config: a configuration or a YAML file of one, such as configs/models/tiny.yaml; what counts
            are its sections model, graph and noise, `training.objective` and `training.seed`.
        tokenizer: of the text, whose N tokens the model is made for; it travels with the model.
        block_length: L, the tokens in a sequence; by default `data.block_length`. Samples are so
            long where nothing else is said; the network itself takes any length.
        overrides: such as "model.num_layers=2", over the configuration.
        device: where the weights go; the GPU of this process where there is one.

    Raises:
        ConfigError: an unknown key, a value that cannot be, or another vocabulary than the
            tokenizer's.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    config = config.override(*overrides, f"model.vocab_size={tokenizer.vocab_size}")
    if block_length is not None:
        config = config.override(f"data.block_length={block_length}")
    config.validate()
    layout = initialize_layout()
    model = ScoreModel(
        config,
        tokenizer.vocab_size,
        layout,
        block_length=config.data.block_length,
        tokenizer=tokenizer,
    )
    return model.to(device or layout.device)
