import json
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_scale.config import load_config
from sedd_scale.planning import plan
from tests.datasets import dataset_of_files
from tests.repository import ROOT

SMALL = "configs/runs/openwebtext_small.yaml"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "sedd_scale", "plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_json_is_the_last_line_and_is_the_plan() -> None:
    finished = run(SMALL, "parallel.zero_stage=2", "--vocab-size", "50257", "--gpus", "8", "--json")
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    found = json.loads(lines[-1])
    config = load_config(ROOT / SMALL, ["parallel.zero_stage=2"])
    planned = plan(config, 8, vocab_size=50_257, block_length=1024)
    assert found["parameters"] == 169_627_218
    assert found["gpus"] == 8 and found["zero_stage"] == 2
    assert found["peak_bytes"] == planned.heaviest.peak
    assert found["stages"][0]["states"]["optimizer"] == planned.stages[0].states.optimizer
    assert found["flops"]["required"] == planned.flops.required
    seconds = config.training.steps * planned.flops.required / (8 * 989e12 * 0.4)
    assert found["seconds"] == pytest.approx(seconds)
    assert "169,627,218" in lines[0]
    assert all(layout["peak_bytes"] <= 72e9 for layout in found["layouts"])


def test_without_gpus_the_fewest_that_hold_the_layout_are_taken() -> None:
    seven = ("configs/runs/openwebtext_7b.yaml", "--vocab-size", "50257", "--json")
    large = json.loads(run(*seven, "--gpu", "h200").stdout.splitlines()[-1])
    small = json.loads(run(*seven, "--gpu-memory-gb", "22").stdout.splitlines()[-1])
    assert large["gpus"] == 8
    assert small["gpus"] > 8
    assert small["peak_bytes"] <= 0.9 * 22e9 < large["peak_bytes"]


def test_a_plan_needs_no_torch() -> None:
    program = (
        "import sys; from sedd_scale.__main__ import main\n"
        "assert main(['plan', *sys.argv[1:]]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, SMALL, "--vocab-size", "50257"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("configs/runs/tiny.yaml",), "--vocab-size N"),
        (("configs/runs/tiny.yaml", "--vocab-size", "9"), "--block-length L"),
        ((SMALL, "--vocab-size", "9", "--gpus", "7"), "training.global_batch=512"),
        ((SMALL, "--vocab-size", "9", "parallel.tensor=5"), "parallel.tensor=5"),
    ],
)
def test_errors_are_one_line_with_the_fix(arguments: tuple[str, ...], named: str) -> None:
    finished = run(*arguments)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and named in finished.stderr


def test_sizes_come_from_the_dataset(tmp_path: Path) -> None:
    texts = (f"{index} masks walk over a river of noise. " * 20 for index in range(20))
    data = dataset_of_files(tmp_path, texts, block_length=32)
    tiny = ("configs/runs/tiny.yaml", f"data.path={data}", "--json")
    found = json.loads(run(*tiny).stdout.splitlines()[-1])
    config = load_config(ROOT / "configs/runs/tiny.yaml")
    planned = plan(config, found["gpus"], vocab_size=257, block_length=32)
    assert found["parameters"] == planned.total_parameters
    mixture = f"data.mixture=[{{path: {tmp_path / 'prepared'}, weight: 1}}]"
    mixed = json.loads(run("configs/runs/tiny.yaml", mixture, "--json").stdout.splitlines()[-1])
    assert mixed["parameters"] == planned.total_parameters
    assert found["flops"]["required"] == planned.flops.required
