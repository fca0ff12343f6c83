"""The curves of runs: what is read, what is averaged, what is drawn, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.__main__ import main
from sedd_scale.config import Config
from sedd_scale.data.shards import Dataset
from sedd_scale.errors import DataError
from sedd_scale.tracking.plots import plot_runs, read_run, smooth
from tests.datasets import dataset_of_words

PNG = b"\x89PNG\r\n\x1a\n"


def training_line(step: int, loss: float | None) -> dict[str, float | int | None]:
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "tokens": 64 * step,
        "tokens_per_second": 1e4,
        "step_ms": 6.4,
    }


def write_run(folder: Path, lines: list[dict[str, float | int | None]], end: str = "") -> Path:
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + end)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    lines = [training_line(step, 8.0 - step / 10) for step in range(1, 41)]
    lines.insert(20, {"step": 20, "valid_nats_per_token": 6.5, "valid_stderr": 0.2})
    return write_run(tmp_path / "first", lines)


def plot(*arguments: str | Path) -> int:
    return main(["plot_run", *map(str, arguments)])


def test_a_run_is_read_as_it_was_written(run_dir: Path):
    run = read_run(run_dir)
    assert run.name == "first"
    np.testing.assert_array_equal(run.training["step"], np.arange(1, 41))
    np.testing.assert_allclose(run.training["loss"], 8.0 - np.arange(1, 41) / 10)
    assert [float(run.validation[key][0]) for key in run.validation] == [20.0, 6.5, 0.2]
    assert run.unigram_nats is None


def test_null_is_a_gap_and_a_line_being_written_is_passed_over(tmp_path: Path):
    lines = [training_line(1, 7.0), training_line(2, None)]
    run = read_run(write_run(tmp_path / "run", lines, end='{"step": 3, "lo'))
    assert len(run.training["step"]) == 2
    assert math.isnan(run.training["loss"][1])
    plot_runs([run], tmp_path / "curves.png")


def test_unigram_entropy_is_that_of_the_runs_validation_text(run_dir: Path, tmp_path: Path):
    data = dataset_of_words(tmp_path / "data", 40, block_length=64, valid_fraction=0.2)
    config = Config().override(f"data.path={data}")
    (run_dir / "config.yaml").write_text(config.to_yaml())
    valid = Dataset(data).reader("valid")
    counts = np.bincount(valid.read(np.arange(len(valid))).ravel())
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum()
    # The index also counts the tokens after the last whole block.
    assert read_run(run_dir).unigram_nats == pytest.approx(entropy, rel=0.01)
    remote = f"data.path=pipe:cat {data}/{{name}}"
    cached = Config().override(remote, f"data.cache_dir={tmp_path / 'cache'}")
    (run_dir / "config.yaml").write_text(cached.to_yaml())
    assert read_run(run_dir).unigram_nats == pytest.approx(entropy, rel=0.01)
    mixed = Config().override(f"data.mixture=[{{path: {data}, weight: 1}}]")
    (run_dir / "config.yaml").write_text(mixed.to_yaml())
    assert read_run(run_dir).unigram_nats == pytest.approx(entropy, rel=0.01)
    (data / "index.json").unlink()
    assert read_run(run_dir).unigram_nats is None


def test_smoothing_is_a_mean_over_the_past():
    constant = np.full(30, 3.5)
    np.testing.assert_allclose(smooth(constant, 7), constant)
    values = np.array([1.0, math.nan, 4.0, 2.0])
    np.testing.assert_allclose(smooth(values, 1)[[0, 2, 3]], [1.0, 4.0, 2.0])
    weights = 0.75 ** np.array([2, 1, 0])
    expected = (weights * [1.0, 4.0, 2.0]).sum() / weights.sum()
    assert smooth(values, 4)[3] == pytest.approx(expected)
    assert math.isnan(smooth(np.array([math.nan, 1.0]), 3)[0])


def test_pictures_of_one_run_and_of_two(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert plot(run_dir) == 0
    assert capsys.readouterr().out.strip() == str(run_dir / "curves.png")
    one = (run_dir / "curves.png").read_bytes()
    assert one.startswith(PNG)
    lines = [training_line(step, 7.0) for step in range(1, 9)]
    second = write_run(run_dir.parent / "second", lines)
    output = run_dir.parent / "both.png"
    assert plot(run_dir, second, "--output", output) == 0
    assert output.read_bytes().startswith(PNG)
    assert output.read_bytes() != one


def test_a_curve_is_drawn_where_its_numbers_are(run_dir: Path, tmp_path: Path):
    """The picture as SVG: as many points on the loss line as there are lines of training."""
    output = tmp_path / "curves.svg"
    assert plot(run_dir, "--output", output) == 0
    paths = [part.split('"')[0] for part in output.read_text().split(' d="')[1:]]
    assert max(path.count("L ") + path.count("M ") for path in paths) == 40


BAD_METRICS = [
    (None, ["holds no metrics.jsonl", "--run-dir"]),
    ("", ["holds no metrics yet"]),
    ('{"step": 1, "lo', ["holds no metrics yet"]),
    ('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n', ["metrics.jsonl:2", "not JSON"]),
    ("[1, 2]\n", ["metrics.jsonl:1", "integer step"]),
    ('{"loss": 2.0}\n', ["metrics.jsonl:1", "integer step"]),
    ('{"step": 1.5, "loss": 2.0}\n', ["metrics.jsonl:1", "integer step"]),
    ('{"step": 1, "loss": "2.0"}\n', ["metrics.jsonl:1", "loss='2.0'"]),
]


@pytest.mark.parametrize(("text", "named"), BAD_METRICS)
def test_bad_metrics_are_one_line(
    text: str | None, named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError):
        read_run(tmp_path)
    assert plot(tmp_path) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for part in named:
        assert part in error
    assert not (tmp_path / "curves.png").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(DataError, match="offset 12"):
        read_run(tmp_path)


def test_outputs_that_cannot_be_are_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    assert plot(run_dir, "--output", run_dir / "curves.txt") == 2
    assert "ends in one of" in capsys.readouterr().err
    assert plot(run_dir, "--output", run_dir / "gone/curves.png") == 2
    assert "does not exist" in capsys.readouterr().err
    assert plot(run_dir, run_dir) == 2
    assert "--output" in capsys.readouterr().err
