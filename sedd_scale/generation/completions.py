"""Samples and infillings of a model in one call: `sedd_scale.sample` and `sedd_scale.infill`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.generation.batch import draw_tokens, equal_requests
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling import samplers_of
from sedd_scale.sampling.infill import (
    DEFAULT_MARKER,
    Given,
    given_of,
    unconditional,
)
from sedd_scale.sampling.settings import SamplerSettings, settings_from_dict

DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
        tokens: its ids, what was given included and padding left out.
        text: what they spell; None where the model has no tokenizer.
    """

    tokens: list[int]
    text: str | None


def sample(
    model: ScoreModel,
    num_samples: int = 1,
    *,
    length: int | None = None,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    **options: Any,
) -> list[Completion]:
    """Draw samples around nothing at all.

    Args:
        model: of `sedd_scale.load_pretrained`.
        length: tokens of a sample; those of the model's block by default.
        seed: of all draws; sample i is the same whatever `num_samples`.
        batch_size: samples drawn together.
        options: those of `SamplerSettings`: sampler, steps, temperature and the others.

    Raises:
        ConfigError: an unknown option, or one that cannot be used.
        CheckpointError: the network's outputs are not finite.
    """
    blank = unconditional(_length(model, length))
    return _completions(model, blank, num_samples, len(blank.tokens_L), seed, batch_size, options)


def infill(
    model: ScoreModel,
    text: str | None = None,
    *,
    prefix: str | None = None,
    suffix: str | None = None,
    tokens: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    marker: str = DEFAULT_MARKER,
    num_samples: int = 1,
    length: int | None = None,
    pad_to_block: bool = False,
    seed: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    **options: Any,
) -> list[Completion]:
    """Draw what is missing between given tokens, which never change.

    Give one of `text` with blanks (`[blank:8]` for 8 tokens, `____` for what the length leaves
    free), `prefix` and/or `suffix`, or `tokens` with their `positions`.

    Args:
        length: tokens of a sample, at most; those of the model's block by default.
        pad_to_block: fill the model's block up with EOS behind the sample, for the network to see
            as it saw short documents in training; otherwise it sees the sample alone.
        model, seed, batch_size, options: as in `sample`.

    Raises:
        ConfigError: an option that cannot be used.
        DataError: none or several kinds of given tokens, text without a tokenizer, or more than
            fits.
        CheckpointError: the network's outputs are not finite.
    """
    values = {
        "text": text,
        "prefix": prefix,
        "suffix": suffix,
        "tokens": tokens,
        "positions": positions,
    }
    given = given_of(
        {name: value for name, value in values.items() if value is not None},
        tokenizer=model.tokenizer,
        num_tokens=model.graph.num_tokens,
        length=_length(model, length),
        marker=marker,
    )
    kept = len(given.tokens_L)
    if pad_to_block:
        given = padded_to_block(model, given)
    return _completions(model, given, num_samples, kept, seed, batch_size, options)


def padded_to_block(model: ScoreModel, given: Given) -> Given:
    """The infill with EOS, given, behind it up to the model's block.

    Raises:
        ConfigError: the model attends within documents, so that no padding reaches a sample, or
            does not know its block.
        DataError: the model has no tokenizer, whose EOS the padding is, or the sample is longer.
    """
    if model.config.model.document_attention:
        raise ConfigError(
            "pad_to_block=true with model.document_attention=true changes nothing, for no position "
            "attends to padding: leave pad_to_block out"
        )
    if model.block_length is None:
        raise ConfigError("pad_to_block=true needs the block length, which the checkpoint lacks")
    if model.tokenizer is None:
        raise DataError("pad_to_block=true needs a tokenizer, whose EOS the padding is: set one")
    missing = model.block_length - len(given.tokens_L)
    if missing < 0:
        raise DataError(
            f"a sample of {len(given.tokens_L)} tokens cannot be padded to {model.block_length}: "
            "shorten it"
        )
    eos = np.full(missing, model.tokenizer.eos_id)
    return Given(np.append(given.tokens_L, eos), np.append(given.fixed_L, eos >= 0))


def _completions(
    model: ScoreModel,
    given: Given,
    num_samples: int,
    kept: int,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
) -> list[Completion]:
    for name, count in (("num_samples", num_samples), ("batch_size", batch_size)):
        if type(count) is not int or count < 1:
            raise ConfigError(f"{name}={count!r} is not a count: give an integer of at least 1")
    settings = settings_for(model, options)
    requests = equal_requests(num_samples, given, seed, settings)
    completions = []
    for start in range(0, num_samples, batch_size):
        for tokens_L in draw_tokens(model, requests[start : start + batch_size]):
            tokens = tokens_L[:kept].tolist()
            text = None if model.tokenizer is None else model.tokenizer.decode(tokens)
            completions.append(Completion(tokens, text))
    return completions


def settings_for(model: ScoreModel, options: Mapping[str, Any]) -> SamplerSettings:
    """Settings of named options, whose sampler is by default the first that the model has."""
    return settings_from_dict({"sampler": samplers_of(model.kind)[0], **options})


def _length(model: ScoreModel, length: int | None) -> int:
    if length is None:
        length = model.block_length
    if length is None:
        raise ConfigError("the checkpoint does not name its block length: give length")
    if length < 1:
        raise ConfigError(f"length={length} is too short: give at least 1")
    return length
