"""The text a model is measured on, as blocks of tokens with what was dropped and how long it was.

A prepared dataset has its blocks; a file's text becomes blocks here (see `text_blocks`), by default
as in training: documents' ids, each document followed by EOS, form one stream that is cut into
blocks of L, and the rest at its end is dropped and reported.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from sedd_scale.config import DataConfig
from sedd_scale.data.cache import FileCache
from sedd_scale.data.corpus import cache_directory
from sedd_scale.data.joint_reader import spread_blocks
from sedd_scale.data.padding import counted_positions
from sedd_scale.data.remote_sources import is_remote
from sedd_scale.data.shards import INDEX_FILE, Dataset
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.evaluation.text_blocks import EvaluationText, TextSettings, read_blocks
from sedd_scale.tokenizers.base import Tokenizer


def open_corpus(
    location: str | Path,
    *,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    block_length: int | None = None,
    default_length: int | None = None,
    split: str | None = None,
    text: TextSettings | None = None,
    max_blocks: int | None = None,
    cache_dir: Path | None = None,
    name: str | None = None,
) -> EvaluationText:
    """Blocks of a prepared dataset, or of a file that prepare_data reads too.

    Args:
        location: of a dataset, whatever data.path may be (a directory, a URL, `pipe:` and a
            command); or a file.
        tokenizer: of the model; needed for a file, compared by fingerprint with a dataset's.
        num_tokens: N of the model.
        block_length: L for a file; a prepared dataset has to have it.
        default_length: L for a file where `block_length` is None.
        split: of a prepared dataset; None: "valid".
        text: how a file's text becomes blocks; None: as `TextSettings` has it, and only None fits a
            prepared dataset.
        max_blocks: the most blocks, evenly spread over the source.
        cache_dir: where files of a remote dataset are kept; None: where training keeps them.
        name: of the corpus, for a file that was fetched by name.

    Raises:
        DataError: nothing there, unreadable, too short, or of another tokenizer.
        ConfigError: `text` or another block length for a prepared dataset, a split for a file.
    """
    path, remote = Path(location), is_remote(str(location))
    prepared = remote or path.is_dir()
    if prepared and text is not None:
        raise ConfigError(
            f"{location} is a prepared dataset, whose blocks are made: leave --detokenizer, "
            "--documents, --no-wrap, --remainder, --field, --format and --members out, or give the "
            "text"
        )
    if max_blocks is not None and max_blocks < 1:
        raise DataError(f"max_blocks={max_blocks} is too few: give at least 1")
    if prepared:
        cache = None
        if remote:
            config = DataConfig(cache_dir=None if cache_dir is None else str(cache_dir))
            cache = FileCache(cache_directory(config), int(config.cache_gb * 1e9))
        elif not (path / INDEX_FILE).is_file():
            raise DataError(
                f"{path} is a directory without {INDEX_FILE}: give one that "
                "sedd-scale prepare_data wrote, or a text file"
            )
        dataset = Dataset(location, cache=cache)
        return _prepared(dataset, tokenizer, num_tokens, block_length, split, max_blocks)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a prepared dataset or a text file")
    if split is not None:
        raise ConfigError(
            f"{path} is a file and has no split {split!r}: leave the split out, or give a "
            "prepared dataset"
        )
    if tokenizer is None:
        raise DataError(
            f"the checkpoint carries no tokenizer to read {path} with: give the one it was trained "
            "with, or a prepared dataset"
        )
    block_length = block_length or default_length
    if block_length is None:
        raise DataError("the checkpoint does not name its block length: give block_length")
    made = read_blocks(path, tokenizer, block_length, text or TextSettings())
    ids_n = spread_blocks(made.source_blocks, max_blocks or made.source_blocks)
    return replace(
        made,
        name=name or made.name,
        blocks_nL=made.blocks_nL[ids_n],
        text_n=made.text_n[ids_n],
        block_ids_n=ids_n,
    )


def _prepared(
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    block_length: int | None,
    split: str | None,
    max_blocks: int | None,
) -> EvaluationText:
    if block_length not in (None, dataset.block_length):
        raise ConfigError(
            f"{dataset.location} has blocks of {dataset.block_length} tokens, not {block_length}: "
            "leave the block length out, or give the text"
        )
    split = split or "valid"
    own = dataset.index["tokenizer"]
    if tokenizer is not None and tokenizer.fingerprint != own["fingerprint"]:
        raise DataError(
            f"{dataset.location} was made with another tokenizer ({own['kind']}, "
            f"{own['fingerprint'][:12]}) than the checkpoint ({tokenizer.kind}, "
            f"{tokenizer.fingerprint[:12]}): prepare the data with the checkpoint's tokenizer"
        )
    # A checkpoint may have a few ids that its tokenizer lacks.
    if dataset.vocab_size != num_tokens and (tokenizer is None or dataset.vocab_size > num_tokens):
        raise DataError(
            f"{dataset.location} has a vocabulary of {dataset.vocab_size} tokens and the "
            f"checkpoint one of {num_tokens}: prepare the data with the checkpoint's tokenizer"
        )
    reader = dataset.reader(split)
    entry = dataset.splits[split]
    ids_n = spread_blocks(len(reader), max_blocks or len(reader))
    blocks_nL = reader.read(ids_n)
    text_n = np.full(len(ids_n), dataset.block_length)
    padded = dataset.index["packing"] == "documents"
    if padded:
        text_n = counted_positions(blocks_nL, dataset.eos_id).sum(axis=1)
    return EvaluationText(
        name=f"{dataset.location} ({split})",
        blocks_nL=blocks_nL,
        text_n=text_n,
        block_ids_n=ids_n,
        source_blocks=len(reader),
        dropped_tokens=int(entry["dropped_tokens"]),
        characters_per_token=entry["characters"] / entry["tokens"],
        bytes_per_token=entry["utf8_bytes"] / entry["tokens"],
        fingerprint=dataset.fingerprint,
        wrap=not padded,
        remainder="pad" if padded else "drop",
        unknown_share=entry["unknown_tokens"] / entry["tokens"],
        notes=dataset.index.get("notes", {}),
    )
