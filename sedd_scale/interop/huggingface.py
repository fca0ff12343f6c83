"""Autoregressive models of transformers, read as ours and written back.

A network of ours has a state more, the mask, behind the N rows of their embedding. Its row begins
near the others: their mean, and noise as wide as they are spread. Its logit is in no loss.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.checkpoint.reading import check_tensors
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import (
    CheckpointSource,
    Description,
    FileSource,
    tokenizer_in,
)
from sedd_scale.interop.foreign_files import (
    CONFIG_FILE,
    CheckpointFiles,
    Entry,
    check_floats,
    open_tensors,
)
from sedd_scale.interop.huggingface_config import config_of, is_causal_lm, raw_of, same_config
from sedd_scale.interop.huggingface_names import (
    BUFFERS,
    HEAD,
    Held,
    held_by,
    our_rows,
    their_rows,
    their_shape,
)
from sedd_scale.interop.safetensors_files import DEFAULT_SHARD_BYTES, DTYPES, write_safetensors
from sedd_scale.interop.sedd_names import VOCABULARY_PARAMETERS
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY, TOKENIZER_FILE, Tokenizer
from sedd_scale.tokenizers.huggingface import HuggingFaceTokenizer
from sedd_scale.tokenizers.opening import open_tokenizer
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer

# Of Description.details: everything that a native copy has to remember to be written back.
DETAILS = "transformers"
_GENERATION_FILE = "generation_config.json"
_TOKENIZERS = (TOKENIZER_FILE, "vocab.json", "tokenizer.model")
# Names there of files of ours, and classes for kinds of tokenizers whose files do not say.
_NAMES = {
    HuggingFaceTokenizer.MODEL_FILE: TOKENIZER_FILE,
    SentencePieceTokenizer.MODEL_FILE: "tokenizer.model",
}
_CLASSES = {"gpt2": "GPT2TokenizerFast", "hf": "PreTrainedTokenizerFast"}
_SEED = 0
_CHUNK_ROWS = 4096


class HuggingFaceSource(FileSource):
    """A directory of transformers' `save_pretrained`: config.json and the weights.

    Raises:
        CheckpointError: another architecture, weights that are not exactly those of the network,
            or a tokenizer with more tokens than it has embeddings.
    """

    format = "hf-causal"

    def __init__(self, files: CheckpointFiles, assumptions: Assumptions) -> None:
        self.path = files.path
        self.holds = frozenset({"ema"})
        file = self.path / CONFIG_FILE
        config = config_of(file, files.config)
        directory = tokenizer_beside(self.path, config.model.vocab_size or 0)
        held = held_by(str(files.config["model_type"]), config)
        self._entries = _weights(files, held, config.model.tied_embedding)
        check_tensors(
            self.path,
            {name: their_shape(held[name], config) for name in held},
            {name: e.shape for name, e in self._entries.items() if name != HEAD or HEAD in held},
        )
        self._holders: dict[str, dict[str, Held]] = {}
        for name, what in held.items():
            self._holders.setdefault(what.ours, {})[name] = what
        kept = {CONFIG_FILE: file, _GENERATION_FILE: self.path / _GENERATION_FILE}
        self.described = Description(
            config=config,
            block_length=config.data.block_length,
            tokenizer_directory=directory,
            details={
                DETAILS: {
                    "files": {
                        name: path.read_bytes().decode()
                        for name, path in kept.items()
                        if path.is_file()
                    },
                    # In their order, by the names of the files.
                    "dtypes": {
                        entry.name: DTYPES.get(entry.dtype, entry.dtype)
                        for entry in self._entries.values()
                    },
                }
            },
        )

    @staticmethod
    def claims(files: CheckpointFiles) -> bool:
        """Whether its config.json is of a language model of transformers, known here or not."""
        return is_causal_lm(files.config)

    def _read(self, name: str, key: str) -> Tensor:
        holders = {
            what: self._entries[theirs].read() for theirs, what in self._holders[name].items()
        }
        shape = self.shapes[name]
        if name not in VOCABULARY_PARAMETERS:
            return our_rows(holders, shape, self.described.config.trunk)
        whole = torch.empty(shape)
        (whole[:-1],) = holders.values()
        whole[-1] = self._mask_row if name == VOCABULARY_PARAMETERS[0] else 0.0
        return whole

    @functools.cached_property
    def _mask_row(self) -> Tensor:
        """Of the embedding, float32 [H]: the same in every process, of one pass over the rows."""
        ((theirs, _),) = self._holders[VOCABULARY_PARAMETERS[0]].items()
        rows = self._entries[theirs].read()
        total, squares = torch.zeros(2, rows.shape[1], dtype=torch.float64)
        for chunk in rows.split(_CHUNK_ROWS):
            total += chunk.double().sum(dim=0)
            squares += chunk.double().square().sum(dim=0)
        mean = total / len(rows)
        spread = (squares / len(rows) - mean.square()).clamp(min=0).sqrt()
        noise = torch.randn(
            len(mean), generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64
        )
        return (mean + spread * noise).float()

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the files have them."""
        return [entry[:4] for entry in self._entries.values()]


def _weights(files: CheckpointFiles, held: Mapping[str, Held], tied: bool) -> dict[str, Entry]:
    """The tensors of the files by the names that `held` has; of GPT-2 some lack the first word.

    Raises:
        CheckpointError: one is not of floating-point numbers, or a tied head has other ones.
    """
    first = next(iter(held)).partition(".")[0] + "."
    entries: dict[str, Entry] = {}
    for name, entry in open_tensors(files).items():
        if name.endswith(BUFFERS):
            continue
        entries[name if name in held or name == HEAD else _prefixed(first, name, held)] = entry
    check_floats(files.weights, entries.values())
    if tied and HEAD in entries:
        (embedding,) = (name for name, of in held.items() if of.ours == VOCABULARY_PARAMETERS[0])
        if embedding in entries and not torch.equal(
            entries[HEAD].read(), entries[embedding].read()
        ):
            raise CheckpointError(
                f"{files.path} has a head of its own ({HEAD}), though {CONFIG_FILE} says "
                "tie_word_embeddings=true: set that to false"
            )
    return entries


def _prefixed(first: str, name: str, held: Mapping[str, Held]) -> str:
    return first + name if first + name in held else name


def tokenizer_beside(path: Path, num_rows: int) -> Path | None:
    """The directory where `write_tokenizer` wrote; CheckpointError: it has too many tokens."""
    if not any((path / name).is_file() for name in _TOKENIZERS):
        return tokenizer_in(path)
    tokens = open_tokenizer(path).vocab_size
    if tokens > num_rows:
        raise CheckpointError(
            f"{path} has a tokenizer of {tokens} tokens and an embedding of {num_rows}: fetch the "
            "tokenizer that belongs to it"
        )
    return path


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write its files by the names that transformers looks for; one of no files as we save it."""
    if not tokenizer.files():
        tokenizer.save(directory / TOKENIZER_DIRECTORY)
    for name, content in tokenizer.files().items():
        (directory / _NAMES.get(name, name)).write_bytes(content)
    settings = directory / "tokenizer_config.json"
    if tokenizer.kind in _CLASSES and not settings.exists():
        named = {"tokenizer_class": _CLASSES[tokenizer.kind]}
        settings.write_text(json.dumps(named) + "\n", encoding="utf-8")


def write_huggingface(
    directory: Path, source: CheckpointSource, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write the averaged weights, without the mask's rows, as a directory of transformers.

    What was read of one has its config.json, its names and its types of numbers again, if it is
    still the same network.

    Args:
        shard_bytes: largest size of one file's tensors.

    Raises:
        CheckpointError: transformers has no such network.
    """
    described = source.described
    config = described.config
    raw = raw_of(config, block_length=described.block_length)
    kept: Mapping[str, Any] = described.details.get(DETAILS) or {}
    texts: dict[str, str] = dict(kept.get("files") or {})
    if not (texts and same_config(texts[CONFIG_FILE], config)):
        kept = {}
        texts = {}
    if texts:
        raw = json.loads(texts[CONFIG_FILE])
    tokenizer = None
    if described.tokenizer_directory is not None:
        tokenizer = open_tokenizer(described.tokenizer_directory)
        raw.setdefault("eos_token_id", tokenizer.eos_id)
    held = held_by(raw["model_type"], config)
    first = next(iter(held)).partition(".")[0] + "."
    by_name = {**held, **{name.removeprefix(first): of for name, of in held.items()}}
    by_name.setdefault(HEAD, next(iter(held.values())))  # of a tied head that is written again
    dtypes: Mapping[str, str] = kept.get("dtypes") or dict.fromkeys(held, "F32")
    raw.setdefault("torch_dtype", "float32")
    directory.mkdir()
    if tokenizer is not None:
        write_tokenizer(tokenizer, directory)
    texts.setdefault(CONFIG_FILE, json.dumps(raw, indent=2, sort_keys=True) + "\n")
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8", newline="")

    def read(theirs: str) -> Tensor:
        of = by_name[theirs]
        return their_rows(of, source.read(of.ours, "ema"), config.trunk)

    write_safetensors(
        directory,
        {name: their_shape(by_name[name], config) for name in dtypes},
        read,
        shard_bytes=shard_bytes,
        dtypes=dtypes,
    )
