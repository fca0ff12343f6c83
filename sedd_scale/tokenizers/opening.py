"""A tokenizer by its kind: from its files in memory, or from the folder it was saved in."""

import json
import os
from collections.abc import Callable
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
from sedd_scale.tokenizers.gpt2 import GPT2Tokenizer, open_gpt2
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer, open_sentencepiece

KINDS = ("sentencepiece", "gpt2", "bytes", "text8")


def tokenizer_of_files(kind: str, files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer that `Tokenizer.files` describes; `kind` is one of `KINDS`."""
    if kind == "sentencepiece":
        return SentencePieceTokenizer(files[SentencePieceTokenizer.MODEL_FILE])
    if kind == "gpt2":
        return GPT2Tokenizer(files[GPT2Tokenizer.VOCABULARY_FILE], files[GPT2Tokenizer.MERGES_FILE])
    return BytesTokenizer() if kind == "bytes" else Text8Tokenizer()


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
    makers: dict[str, Callable[[], Tokenizer]] = {
        "sentencepiece": lambda: open_sentencepiece(source / SentencePieceTokenizer.MODEL_FILE),
        "gpt2": lambda: open_gpt2(source),
        "bytes": BytesTokenizer,
        "text8": Text8Tokenizer,
    }
    if kind not in makers or description["version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} describes no tokenizer that this program reads ({', '.join(KINDS)}, version "
            f"{FORMAT_VERSION}): prepare the data again"
        )
    tokenizer = makers[kind]()
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise DataError(
            f"the tokenizer files in {source} are not the ones that were saved (their fingerprint "
            "differs): restore them or prepare the data again"
        )
    return tokenizer
