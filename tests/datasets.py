"""Small prepared datasets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sedd_scale.preparation.prepare import prepare
from tests.data.corpus import make_texts, write_jsonl


def letters(count: int = 12, *, seed: int = 0) -> list[str]:
    """Texts of 400 random letters and spaces."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), size=400)) for _ in range(count)]


def dataset_of_files(folder: Path, texts: Iterable[str], **choices: Any) -> Path:
    """The dataset of texts, each a file in `folder`; as bytes unless chosen otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    chosen = {"tokenizer": "bytes", "valid_fraction": 0.2, **choices}
    prepare([str(folder / "*.txt")], output=folder / "prepared", **chosen)
    return folder / "prepared"


def dataset_of_words(output: Path, count: int, *, seed: int = 0, **choices: Any) -> Path:
    """The dataset of `count` documents of words, as bytes unless chosen otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(output.with_suffix(".jsonl"), make_texts(count, seed=seed))
    prepare([str(source)], output=output, **{"tokenizer": "bytes", **choices})
    return output
