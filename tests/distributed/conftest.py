"""A small prepared dataset for the runs of this folder."""

from pathlib import Path

import numpy as np
import pytest

from tests.datasets import dataset_of_files

WORDS = ["the", "one", "mask", "token", "noise", "score", "river", "stone", "walks", "falls", "old"]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of random words, as bytes (N = 257), in blocks of 32."""
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, size=120)) for _ in range(40))
    return dataset_of_files(tmp_path_factory.mktemp("dataset"), texts, block_length=32)
