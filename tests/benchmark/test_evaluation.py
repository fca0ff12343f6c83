"""The benchmark of the bound's protocols at a small size: what it reports fits together."""

import argparse
from pathlib import Path

import pytest

from sedd_scale.benchmark import evaluation
from sedd_scale.errors import ConfigError
from tests.datasets import dataset_of_words


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluation.add_arguments(parser.add_subparsers())
    return parser.parse_args(["eval", *map(str, words)])


def test_calls_for_the_same_error(tmp_path: Path) -> None:
    data = dataset_of_words(tmp_path / "data", 20, block_length=32, valid_fraction=0.5)
    words = ("--data", data, "--block-length", 32, "--blocks", 8, "--threads", 1)
    words += ("--train-steps", 2, "--num-seeds", 2, "--draws", 8, "--paper-draws", 8)
    result = evaluation.measure(parsed(*words, "model.hidden_size=32", "model.num_layers=1"))
    assert result["paper_calls"] == 8 * 8
    assert 8 * 8 < result["low_variance_calls"] <= 2 * 8 * 8
    cost = [
        result[f"{name}_calls"] * result[f"{name}_stderr"] ** 2
        for name in ("paper", "low_variance")
    ]
    assert result["calls_ratio"] == pytest.approx(cost[0] / cost[1])
    assert result["calls_ratio"] > 1.5
    with pytest.raises(ConfigError, match="--checkpoint needs --data"):
        evaluation.measure(parsed("--checkpoint", tmp_path))
    with pytest.raises(ConfigError, match="has blocks of 32 tokens"):
        evaluation.measure(parsed(*words, "--block-length", 64))
