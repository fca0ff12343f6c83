"""What a run says to people of settings that do not go well together."""

import json
import math
from pathlib import Path

import pytest

from sedd_scale.config import load_config
from sedd_scale.interop.model_source import ModelSource
from sedd_scale.interop.native import write_native_run
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.tracking.console import format_validation_line
from sedd_scale.training.learning_rate import unreached_rate
from sedd_scale.training.loop import train
from tests.datasets import dataset_of_words
from tests.repository import ROOT

TINY = ROOT / "configs/runs/tiny.yaml"
SMALL = (
    *("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "model.cond_dim=8"),
    *("training.global_batch=4", "training.micro_batch=4", "training.steps=2"),
    *("training.valid_every=1", "training.valid_blocks=1", "logging.every=1"),
)


@pytest.mark.parametrize("warmup", [1, 50])
def test_notes_of_a_run(warmup: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = dataset_of_words(tmp_path / "data", 60, block_length=32, valid_fraction=0.2)
    source = load_config(TINY, [*SMALL, "training.seed=3"])
    for length in (16, 32):
        model = ScoreModel(source, 257, initialize_layout(), block_length=length)
        write_native_run(ModelSource(model), tmp_path / f"from-{length}")
    for length in (16, 32):
        overrides = [*SMALL, f"data.path={data}", f"optimizer.warmup_steps={warmup}"]
        config = load_config(TINY, [*overrides, f"model.init_from={tmp_path}/from-{length}"])
        capsys.readouterr()
        train(config, tmp_path / f"run-{length}")
        said = capsys.readouterr().out
        assert "nan" not in said
        assert said.count("validation bound") == 2
        assert ("optimizer.warmup_steps=50 is more than training.steps=2" in said) == (warmup == 50)
        longer = f"blocks of 32 tokens are longer than the 16 that {tmp_path}/from-16"
        assert (longer in said) == (length == 16)
        lines = (tmp_path / f"run-{length}/metrics.jsonl").read_text().splitlines()
        checks = [json.loads(line) for line in lines if "valid_stderr" in line]
        assert [check["valid_stderr"] for check in checks] == [None, None]


def test_a_standard_error_is_said_where_there_is_one() -> None:
    assert "5.0912 +- 0.5598 nats" in format_validation_line(1, 2, 5.0912, 0.5598)
    assert "bound 5.0912 nats" in format_validation_line(1, 2, 5.0912, math.nan)


@pytest.mark.parametrize(("steps", "noted"), [(49, True), (50, False), (51, False)])
def test_a_warm_up_that_just_fits_is_not_noted(steps: int, noted: bool) -> None:
    config = load_config(TINY, [f"training.steps={steps}", "optimizer.warmup_steps=50"])
    assert (unreached_rate(config) is not None) == noted
