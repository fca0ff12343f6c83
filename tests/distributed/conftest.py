"""A small prepared dataset for the runs of this folder."""

from pathlib import Path

import numpy as np
import pytest

from sedd_scale.preparation.prepare import prepare

WORDS = ["the", "one", "mask", "token", "noise", "score", "river", "stone", "walks", "falls", "old"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of random words, as bytes (N = 257), in blocks of 32."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for index in range(40):
        text = " ".join(rng.choice(WORDS, size=120))
        (folder / f"{index}.txt").write_text(text)
    prepare(
        [str(folder / "*.txt")],
        output=folder / "prepared",
        block_length=32,
        tokenizer="bytes",
        valid_fraction=0.2,
    )
    return folder / "prepared"
