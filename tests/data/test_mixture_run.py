"""A run on a mixture with stages: resumed across a change of weights it is the same run."""

import json
from pathlib import Path

import pytest

from sedd_scale.config import Config, load_config
from sedd_scale.errors import CheckpointError
from sedd_scale.training.loop import train
from tests.datasets import dataset_of_words
from tests.repository import CONFIGS

TINY = CONFIGS / "runs/tiny.yaml"


def mixture_in(directory: Path) -> str:
    entries = []
    for seed in (1, 2):
        out = dataset_of_words(
            directory / str(seed), 30, seed=seed, block_length=16, valid_fraction=0.1
        )
        entries.append({"path": str(out), "weight": 1})
    return json.dumps(entries)


def configured(mixture: str, steps: int, *overrides: str) -> Config:
    return load_config(
        TINY,
        [
            f"data.mixture={mixture}",
            f"training.steps={steps}",
            "model.hidden_size=16",
            "model.num_heads=2",
            "optimizer.warmup_steps=0",
            "training.valid_blocks=8",
            "logging.every=1",
            *overrides,
        ],
    )


def history(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "step_ms", "mfu", "memory_bytes")
    return [
        {key: value for key, value in line.items() if key not in timed}
        for line in lines
        if "loss" in line
    ]


def test_resume_across_a_stage(tmp_path: Path) -> None:
    mixture = mixture_in(tmp_path)
    stages = "data.stages=[{step: 3, weights: [0, 1]}, {step: 5, weights: [3, 1]}]"
    train(configured(mixture, 7, stages), tmp_path / "whole")
    # The first part does not know of the later stages yet.
    train(configured(mixture, 2), tmp_path / "parts")
    train(configured(mixture, 4, stages), tmp_path / "parts")
    train(configured(mixture, 7, stages), tmp_path / "parts")
    whole, parts = history(tmp_path / "whole"), history(tmp_path / "parts")
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6, 7]
    assert parts == whole
    consumed = [line["epoch_0"] for line in whole]
    assert consumed[2] == consumed[3] == consumed[4] < consumed[5]
    assert whole[-1]["epoch_1"] > 0
    with pytest.raises(CheckpointError, match=r"change them from step 7 on with data\.stages"):
        train(configured(mixture, 9), tmp_path / "parts")
    with pytest.raises(CheckpointError, match=r"data\.shuffle_window=262144, not 50"):
        train(configured(mixture, 9, stages, "data.shuffle_window=50"), tmp_path / "parts")
