"""How text becomes a dataset: everything that its bytes depend on."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sedd_scale.errors import ConfigError
from sedd_scale.preparation.document_formats import FORMATS
from sedd_scale.preparation.documents import DocumentStream
from sedd_scale.preparation.packing import PACKINGS
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.opening import TOKENIZERS

DEFAULT_SENTENCEPIECE_VOCABULARY = 8192
DEFAULT_VALID_FRACTION = 0.02
DEFAULT_BLOCKS_PER_SHARD = 16_384
DEFAULT_TOKENIZER_SAMPLE = 10_000_000
# In a block.
MOST_TOKENS = 2**27


@dataclass(frozen=True)
class Preparation:
    """Input and choices of a preparation.

    Attributes:
        inputs: globs of files, or `builtin:python` (see documents).
        block_length: L, tokens per block.
        tokenizer: hf, sentencepiece, gpt2, bytes or text8.
        tokenizer_path: the model or vocabulary to load; without it sentencepiece is trained.
        vocab_size: N of the sentencepiece model to train; else, if given, must be the tokenizer's
            N.
        tokenizer_sample: characters of training documents that sentencepiece is trained on.
        field: the field of a .jsonl line or the column of a .parquet that holds the text.
        format: of all inputs, one of `FORMATS`; None: each by its first bytes or its name.
        members: of archives, only those whose names end in this; None: text and JSON.
        valid_fraction: share of documents that validate; 0: no validation split.
        test_fraction: share of documents that test; 0: no test split.
        blocks_per_shard: blocks in every shard but a split's last.
        packing: how documents fill blocks, "continuous" or "documents" (see packing).
        dedupe: keep only the first of documents with exactly equal text.
    """

    inputs: Sequence[str]
    block_length: int
    tokenizer: str
    tokenizer_path: Path | None = None
    vocab_size: int | None = None
    tokenizer_sample: int = DEFAULT_TOKENIZER_SAMPLE
    field: str = "text"
    format: str | None = None
    members: str | None = None
    valid_fraction: float = DEFAULT_VALID_FRACTION
    test_fraction: float = 0.0
    blocks_per_shard: int = DEFAULT_BLOCKS_PER_SHARD
    packing: str = PACKINGS[0]
    dedupe: bool = False

    def check(self) -> None:
        """Refuse what does not go together; raises ConfigError."""
        for name in ("block_length", "blocks_per_shard", "tokenizer_sample"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(self, name)}: give at least 1")
        if self.block_length > MOST_TOKENS:
            raise ConfigError(
                f"--block-length {self.block_length} is too large: give at most {MOST_TOKENS}"
            )
        for name, known in (("tokenizer", TOKENIZERS), ("format", FORMATS), ("packing", PACKINGS)):
            given = getattr(self, name)
            if given not in known and (name, given) != ("format", None):
                raise ConfigError(f"--{name} {given} is unknown: give one of {', '.join(known)}")
        kind, made = self.tokenizer, TOKENIZERS[self.tokenizer]
        if made.file_names and not made.trained and self.tokenizer_path is None:
            raise ConfigError(f"--tokenizer {kind} needs --tokenizer-path: {made.found_in}")
        if not made.file_names and self.tokenizer_path is not None:
            raise ConfigError(f"--tokenizer {kind} has no files: leave --tokenizer-path out")
        for name, share in (("valid", self.valid_fraction), ("test", self.test_fraction)):
            if not 0 <= share < 1:
                raise ConfigError(f"--{name}-fraction {share} is not in [0, 1): give 0.02, say")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"--valid-fraction {self.valid_fraction} and --test-fraction {self.test_fraction} "
                "leave nothing to train on: give less than 1 together"
            )

    def identity(self, documents: DocumentStream, codec: Tokenizer | None) -> dict[str, Any]:
        """What the bytes depend on, by the command's options; of plain types, for the journal."""
        others = [one.name for one in fields(self)][3:]
        assert others[0] == "tokenizer_path"
        return {
            "--input": documents.identity() + [[platform.python_version()]] * documents.builtin,
            "--tokenizer": [self.tokenizer, codec.fingerprint if codec else None],
            "--block-length": self.block_length,
            **{"--" + name.replace("_", "-"): getattr(self, name) for name in others[1:]},
        }
