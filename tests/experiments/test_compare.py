"""Comparisons from text to report, on runs of seconds; what cannot be compared is refused."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from sedd_scale.__main__ import main
from sedd_scale.errors import ConfigError
from sedd_scale.experiments import comparison
from sedd_scale.experiments.experiment import load_experiment
from sedd_scale.experiments.report import report_lines, summarise
from sedd_scale.files.folder_lock import lock_folder
from tests.repository import ROOT

EXPERIMENTS = sorted((ROOT / "configs/experiments").glob("*.yaml"))

STEPS = 600  # of the run that is stopped

TINY = {
    "title": "Seconds",
    "baseline": "autoregressive",
    "seeds": [0],
    "jobs": 2,
    "threads": 1,
    "data": {"tokenizer": "text8", "block_length": 16, "valid_fraction": 0.3},
    "evaluation": {"max_blocks": 8, "draws": 4, "batch_size": 32},
    "run": {
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "cond_dim": 8},
        "optimizer": {"warmup_steps": 2, "ema_decay": 0.5, "lr": 0.01},
        "training": {
            "steps": 12, "global_batch": 8, "micro_batch": 8, "precision": "fp32",
            "valid_every": 6, "valid_blocks": 8,
        },
        "logging": {"every": 6},
    },
    "variants": {
        "autoregressive": {"training.objective": "autoregressive"},
        "score_entropy": {"graph.name": "absorb"},
    },
}  # fmt: skip


def written(folder: Path, **changes: object) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def words_of_five(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    path = folder / "texts.jsonl"
    with path.open("w") as stream:
        for _ in range(40):
            words = rng.choice(["the", "river", "stone", "walks", "old"], size=60)
            stream.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def compare(config: Path, *arguments: object) -> int:
    return main(["compare", str(config), *map(str, arguments)])


def test_from_text_to_report_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = words_of_five(tmp_path)
    output, config = tmp_path / "out", written(tmp_path)
    none = (config, "--data", tmp_path / "none*.jsonl", "--output", output)
    assert compare(*none) == 2
    assert "none*.jsonl matches no file" in capsys.readouterr().err
    arguments = (config, "--data", tmp_path / "text*.jsonl", "--output", output)
    assert compare(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.count("training") == 2
    report = json.loads((output / "report.json").read_text())
    first, second = report["variants"]
    assert (first["variant"], first["kind"]) == ("autoregressive", "exact")
    assert first["ratio"] == {"mean": 1.0, "stderr": None}
    assert second["kind"] == "bound"
    assert report["tokens_per_run"] == 12 * 8 * 16
    bits = second["bits_per_char"]["mean"]
    # Twelve steps: better than nothing at all, worse than the entropy of five words.
    assert 1.0 < first["bits_per_char"]["mean"] < bits < math.log2(27)
    assert second["ratio"]["mean"] == pytest.approx(bits / first["bits_per_char"]["mean"])
    assert second["normalised_bits_per_char"]["mean"] <= bits
    assert f"| score_entropy | {bits:.3f} |" in (output / "report.md").read_text()
    assert (output / "report.png").read_bytes()[:4] == b"\x89PNG"
    metrics = [
        (output / "runs" / f"{name}-0" / "run" / "metrics.jsonl").read_text().count("\n")
        for name in TINY["variants"]  # type: ignore[attr-defined]
    ]
    assert metrics[0] == metrics[1] > 0

    assert compare(*arguments) == 0  # nothing is left to do
    assert "training" not in capsys.readouterr().err
    assert json.loads((output / "report.json").read_text()) == report
    ready = ("--data", output / "data", "--output", output)
    assert compare(config, *ready) == 0  # by another path
    assert "training" not in capsys.readouterr().err
    texts.write_text(texts.read_text() * 2)
    for data, changes, message in (
        (tmp_path / "text*.jsonl", {}, "dataset made with another bytes ("),
        (texts, {}, f"another text ({tmp_path}/text*.jsonl, now {texts})"),
        (output / "data", {"evaluation": {"draws": 3}}, "a run of another configuration"),
        (output / "data", {"data": {"block_length": 8}}, "has block_length 16, but the exp"),
        (output / "data", {"data": {"tokenizer": "bytes", "block_length": 16}}, "tokenizer text8"),
    ):
        given = (written(tmp_path, **changes), "--data", data, "--output", output)
        assert compare(*given) == 2
        assert message in capsys.readouterr().err


def test_a_variant_starts_from_the_run_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mean = {"model.parametrisation": "mean"}
    variants = {
        "first": {"training.objective": "autoregressive", "training.steps": 24},
        "second": {"starts_from": "first", **mean},
        "third": mean,
    }
    run = copy.deepcopy(TINY["run"])
    run["model"] |= {"conditioning": "none", "time_conditioning": False}  # type: ignore[index]
    config = written(tmp_path, run=run, variants=variants, baseline="third", seeds=[3])
    output = tmp_path / "out"
    arguments = (config, "--data", words_of_five(tmp_path), "--output", output)
    assert compare(*arguments, "--only", "second") == 0
    assert capsys.readouterr().err.count("training") == 3  # with what it starts from
    log = (output / "runs/second-3/train.log").read_text()
    assert f"initialised from {output}/runs/first-3/run" in log and "(native, step 24)" in log
    report = json.loads((output / "report.json").read_text())
    assert [row["starts_from"] for row in report["variants"]] == [None, "first", None]
    assert [row["tokens"] for row in report["variants"]] == [24 * 128, 12 * 128, 12 * 128]
    assert [point["tokens"] for point in report["validation"]] == [6 * 128, 12 * 128]
    last = report["validation"][-1]["bits_per_char"]
    assert last.keys() == {"second", "third"} and all(0 < bits < 5 for bits in last.values())
    assert "second (1,536 tokens): starts from first, " in (output / "report.md").read_text()
    assert compare(*arguments) == 0  # nothing is left to do
    assert "training" not in capsys.readouterr().err
    changed = variants | {"first": variants["first"] | {"optimizer.lr": 0.02}}
    shutil.rmtree(output / "runs/first-3")
    written(tmp_path, run=run, variants=changed, baseline="third", seeds=[3])
    assert compare(*arguments) == 2  # the second began with another
    assert "second-3 holds a run of another configuration" in capsys.readouterr().err


def test_the_last_complaint_of_a_failed_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; print('step 3', flush=True); sys.exit('train.py: error: loss nan')"
    (tmp_path / "train.py").write_text(program)
    monkeypatch.setattr(comparison, "command", lambda name: [sys.executable, tmp_path / "train.py"])
    arguments = (written(tmp_path), "--data", words_of_five(tmp_path), "--output", tmp_path / "out")
    assert compare(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ended with code 1: train.py: error: loss nan (see" in error
    log = tmp_path / "out/runs/autoregressive-0/train.log"
    assert log.read_text().splitlines() == ["train.py: error: loss nan", "step 3"]


def test_a_stopped_comparison_leaves_no_run_behind_and_goes_on(tmp_path: Path) -> None:
    run = copy.deepcopy(TINY["run"])
    run["training"] |= {"steps": STEPS, "valid_every": 0}  # type: ignore[index]
    variants = {"autoregressive": {"training.objective": "autoregressive"}}
    config, output = written(tmp_path, run=run, variants=variants), tmp_path / "out"
    command = [sys.executable, "-m", "sedd_scale", "compare", config]
    command += ["--data", words_of_five(tmp_path), "--output", output]
    process = subprocess.Popen(command, start_new_session=True)
    metrics = output / "runs/autoregressive-0/run/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    with pytest.raises(ConfigError, match=f"is in use: process {process.pid} on .*another --out"):
        lock_folder(output, option="--output", patience=0.0)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):  # nobody is left of its session
        os.killpg(process.pid, 0)
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] < STEPS
    changed = written(tmp_path, run=run | {"optimizer": {"lr": 0.02}}, variants=variants)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "of another configuration" in refused.stderr
    assert changed == written(tmp_path, run=run, variants=variants)
    folder = output / "runs/autoregressive-0"
    (folder / "train_begun").write_text("")  # as if another attempt had been killed
    os.utime(folder / "train_begun", (0, metrics.stat().st_mtime - 7))
    subprocess.run(command, check=True, capture_output=True)
    assert not (folder / "train_begun").exists()
    (row,) = json.loads((output / "report.json").read_text())["variants"]
    parts = (folder / "train_seconds").read_text().split()
    assert (
        len(parts) == 3
        and float(parts[1]) == pytest.approx(7.0, abs=0.2)
        and row["train_seconds"]["mean"] == sum(map(float, parts))
    )
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS


def test_errors_are_over_seeds_and_ratios_seed_by_seed(tmp_path: Path) -> None:
    experiment = load_experiment(written(tmp_path, seeds=[3, 5]))
    nats = {("autoregressive", 3): 1.0, ("autoregressive", 5): 2.0}
    nats |= {("score_entropy", 3): 1.2, ("score_entropy", 5): 2.6}
    results = []
    for (name, seed), value in reversed(nats.items()):
        evaluation = {
            "kind": "exact", "bits_per_char": value / math.log(2), "stderr": 0.01,
            "perplexity": math.exp(value), "nats_per_token": 4 * value, "tokens": 128,
        }  # fmt: skip
        if name == "score_entropy":
            evaluation |= {"kind": "bound", "normalised_nats_per_token": 3.6 * value}
        results.append(
            {"variant": name, "seed": seed, "train_seconds": 1.0, "evaluation": evaluation}
        )
    summary = summarise(experiment, results)
    row = summary["variants"][1]
    assert row["stderr_draws"] == pytest.approx(0.01 / 4 / math.log(2))  # four characters a token
    assert row["ratio"]["mean"] == pytest.approx(1.25)
    assert row["ratio"]["stderr"] == pytest.approx(0.05)  # |1.2 - 1.3| / 2
    assert row["normalised_ratio"]["mean"] == pytest.approx(0.9 * 1.25)
    assert row["bits_per_char"]["mean"] == pytest.approx(1.9 / math.log(2))
    assert any("| 1.250 ± 0.050 |" in line for line in report_lines(summary))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_can_be_compared(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.tokens_per_run > 0
    known = {
        "ablations": {"no_time_conditioning", "no_zero_init", "uniform_geometric"},
        "precision": {"fp32", "bf16_stream_fp32", "bf16_stream_bf16"},
        "muon": {"adamw", "muon_ratio_1", "muon_ratio_4"},
        "adapting": {"scratch", "adapted", "adapted_annealed", "adapted_calibrated"},
    }.get(path.stem, {"autoregressive", "score_entropy_absorb", "score_entropy_uniform"})
    assert known <= set(experiment.variants)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "gpt"}, "baseline=gpt is none of the variants"),
        ({"seeds": []}, "seeds="),
        ({"seeds": [-1]}, "one below 0"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"jobs": 0}, "jobs=0 is not a count"),
        ({"runs": 3}, "unknown key runs"),
        ({"evaluation": {"draw": 3}}, "unknown key evaluation.draw"),
        ({"evaluation": {"draws": 1}}, "evaluation.draws=1 leaves no way"),
        ({"baseline": ["autoregressive"]}, "is none of the variants"),
        ({"variants": {"autoregressive": 3}}, "variant autoregressive: has to be a mapping"),
        ({"variants": {"autoregressive": {}, "a/../../b": {}}}, "cannot name a folder"),
        ({"evaluation": {"draws": 0}}, "has to be above 0"),
        ({"data": {"tokenizer": 3}}, "has another kind"),
        ({"run": None}, "run: has to be a mapping"),
        ({"variants": {"autoregressive": {"training.steps": 3}, "b": {}}}, "equal tokens"),
        ({"variants": {"autoregressive": {"data.path": "x"}}}, "sets its own data"),
        (
            {"variants": {"autoregressive": {"starts_from": "b"}, "b": {}}},
            "starts_from=b, which is none of the variants before it: there are none",
        ),
        (
            {"variants": {"autoregressive": {}, "b": {"starts_from": "autoregressive"}}},
            "baseline=autoregressive is what other variants start from",
        ),
        (
            {"variants": {"autoregressive": {}, "b": {"training.objective": "mdlm"}}},
            "variant b: training.objective=mdlm is not one of",
        ),
        (
            {
                "variants": {
                    "autoregressive": {},
                    "b": {"training.objective": "d3pm_absorb", "graph.name": "uniform"},
                }
            },
            "needs a mask",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(written(tmp_path, **changes))
