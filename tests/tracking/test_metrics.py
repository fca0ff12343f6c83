"""metrics.jsonl holds one history, and the console says it in a line."""

import io
import json
import math
from pathlib import Path
from typing import Any

import torch

from sedd_scale.config import LoggingConfig, load_config
from sedd_scale.planning.flops import step_flops
from sedd_scale.tracking.metrics import TRAINING_VALUES, MetricsLog
from sedd_scale.tracking.utilisation import Utilisation


def line(step: int) -> dict[str, Any]:
    return {
        "loss": 4.0 + step,
        "grad_norm": 0.93,
        "lr": 1e-3,
        "tokens": 100 * step,
        "tokens_per_second": 12_345.0,
        "step_ms": 162.0,
        "loss_z": math.nan,
        "grad_norm_z": math.nan,
        "skipped_steps": 0,
    }


def record(run_dir: Path, steps: range, resumed_step: int | None = None, **options: Any) -> str:
    stream = io.StringIO()
    log = MetricsLog(
        run_dir,
        options.pop("config", LoggingConfig()),
        is_main=True,
        total_steps=2000,
        resumed_step=resumed_step,
        stream=stream,
        **options,
    )
    for step in steps:
        log.training(step, line(step))
    log.validation(steps[-1], nats_per_token=4.5, stderr=0.01)
    log.close()
    return stream.getvalue()


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_json_object_a_line(tmp_path: Path) -> None:
    console = record(tmp_path, range(10, 40, 10))
    found = lines(tmp_path)
    unknown = {"loss_z": None, "grad_norm_z": None}
    assert line(1).keys() == TRAINING_VALUES.keys()
    assert found[:3] == [{"step": step, **line(step), **unknown} for step in (10, 20, 30)]
    assert found[3] == {"step": 30, "valid_nats_per_token": 4.5, "valid_stderr": 0.01}
    assert len(console.splitlines()) == 4
    assert "\x1b" not in console


def test_a_resume_keeps_one_history(tmp_path: Path) -> None:
    record(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 4.')  # a crash in the middle of a line
    record(tmp_path, range(5, 10), resumed_step=4)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    record(tmp_path, range(1, 3))
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, LoggingConfig(), is_main=True, total_steps=5, stream=io.StringIO())
    log.training(1, {**line(1), "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    (found,) = lines(tmp_path)
    assert found["loss"] is None and found["grad_norm"] is None and found["lr"] == 1e-3


def test_other_processes_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = MetricsLog(
        tmp_path, LoggingConfig(wandb="online"), is_main=False, total_steps=5, stream=stream
    )
    log.training(1, line(1))
    log.validation(1, nats_per_token=1.0, stderr=0.1)
    log.advance(1)
    log.say("hello")
    log.close()
    assert not list(tmp_path.iterdir()) and not stream.getvalue()


def test_what_the_machine_is_used_for_is_recorded(tmp_path: Path) -> None:
    """Twice the seconds a step are half the share of the peak."""
    config = load_config(Path(__file__).parents[2] / "configs/runs/tiny.yaml")
    config = config.override("model.vocab_size=257", "data.block_length=64")
    utilisation = Utilisation(config, torch.device("cpu"), 2)
    assert utilisation.peak.name == "measured peak"
    flops = step_flops(config, vocab_size=257, block_length=64).required / 2
    expected = flops / 0.5 / utilisation.peak.flops_per_second
    assert math.isclose(utilisation.mfu(0.5), expected)
    assert math.isclose(utilisation.mfu(1.0), expected / 2)
    record(tmp_path, range(1, 2), utilisation=utilisation)
    found = lines(tmp_path)[0]
    assert math.isclose(found["mfu"], utilisation.mfu(0.162))
    assert found["memory_bytes"] > 1e8  # torch alone is larger


def test_an_error_leaves_the_file_whole(tmp_path: Path) -> None:
    try:
        with MetricsLog(
            tmp_path, LoggingConfig(), is_main=True, total_steps=5, stream=io.StringIO()
        ) as log:
            log.training(1, line(1))
            raise KeyError("a run that fails")
    except KeyError:
        pass
    assert [entry["step"] for entry in lines(tmp_path)] == [1]
