"""A tokenizer by its kind: from its files in memory, or from the folder it was saved in."""

import json
import os
from pathlib import Path
from typing import Any

from sedd_scale.errors import DataError
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.tokenizers.base import (
    FORMAT_VERSION,
    TOKENIZER_FILE,
    Tokenizer,
    read_tokenizer_file,
)
from sedd_scale.tokenizers.gpt2 import GPT2Tokenizer
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer

# The class of each kind, and the files that it is made of.
_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sentencepiece": (SentencePieceTokenizer, (SentencePieceTokenizer.MODEL_FILE,)),
    "gpt2": (GPT2Tokenizer, (GPT2Tokenizer.VOCABULARY_FILE, GPT2Tokenizer.MERGES_FILE)),
    "bytes": (BytesTokenizer, ()),
    "text8": (Text8Tokenizer, ()),
}
KINDS = tuple(_KINDS)


def tokenizer_of_files(kind: str, files: dict[str, bytes], folder: str = "") -> Tokenizer:
    """The tokenizer that `Tokenizer.files` describes; `kind` is one of `KINDS`."""
    made, names = _KINDS[kind]
    named = {"name": os.path.join(folder, names[0])} if names else {}
    tokenizer: Tokenizer = made(*(files[name] for name in names), **named)
    return tokenizer


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `directory`.

    Raises:
        DataError: the directory holds none, a file is missing, or its files were changed since.
    """
    source = Path(directory)
    path = source / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(
            f"{source} holds no {TOKENIZER_FILE}: give a directory that prepare_data made"
        )
    try:
        description: Any = json.loads(read_tokenizer_file(path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): prepare the data again") from error
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind not in KINDS or description["version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} describes no tokenizer that this program reads ({', '.join(KINDS)}, version "
            f"{FORMAT_VERSION}): prepare the data again"
        )
    files = {name: read_tokenizer_file(source / name) for name in _KINDS[kind][1]}
    tokenizer = tokenizer_of_files(kind, files, str(source))
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise DataError(
            f"the tokenizer files in {source} are not the ones that were saved (their fingerprint "
            "differs): restore them or prepare the data again"
        )
    return tokenizer
