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
from sedd_scale.tokenizers.huggingface import HuggingFaceTokenizer
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {
    made.kind: made
    for made in (
        HuggingFaceTokenizer,
        SentencePieceTokenizer,
        GPT2Tokenizer,
        BytesTokenizer,
        Text8Tokenizer,
    )
}
"""Every kind of tokenizer by its name. Of several in one folder the first of these is meant."""


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote, or the one of another program's files.

    Raises:
        DataError: nothing readable there.
    """
    # Other programs have files of that name, which say no kind.
    if "kind" not in _description(path / TOKENIZER_FILE):
        for made in TOKENIZERS.values():
            files = made.files_at(path)
            if files is not None:
                return made.of_files(files, str(path))
    return load_tokenizer(path)


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
    description = _description(path)
    kind = description.get("kind")
    if kind not in TOKENIZERS or description["version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} describes no tokenizer that this program reads ({', '.join(TOKENIZERS)}, "
            f"version {FORMAT_VERSION}): prepare the data again"
        )
    made = TOKENIZERS[kind]
    files = {name: read_tokenizer_file(source / name) for name in made.file_names}
    more = (source / name for name in made.optional_files if name in description.get("files", []))
    files |= {path.name: read_tokenizer_file(path) for path in more}
    tokenizer = made.of_files(files, os.path.join(source, *made.file_names[:1]))
    if tokenizer.fingerprint != description.get("fingerprint"):
        raise DataError(
            f"the tokenizer files in {source} are not the ones that were saved (their fingerprint "
            "differs): restore them or prepare the data again"
        )
    return tokenizer


def _description(path: Path) -> dict[str, Any]:
    """What tokenizer.json says, where there is one; DataError where it is not JSON."""
    try:
        description = json.loads(read_tokenizer_file(path)) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): restore it") from error
    return description if isinstance(description, dict) else {}
