"""Every benchmark runs at a small size, and what it reports fits together."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.benchmark import communication, data, optimizer, step
from tests.repository import ROOT

SMALL = ["--model", "tiny", "--block-length", "32", "--vocab-size", "300"]


def parsed(module: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser.add_subparsers())
    return parser.parse_args([module.__name__.rpartition(".")[2], *words])


def assert_ratios(result: dict[str, Any]) -> None:
    assert result["seconds"] > 0 and result["baseline_seconds"] > 0
    assert result["speedup"] == pytest.approx(result["baseline_seconds"] / result["seconds"])
    assert result["extra_mb"] >= 0 and result["baseline_extra_mb"] >= 0
    json.dumps(result)


@pytest.mark.parametrize("overrides", [(), ("graph.name=uniform",)])
def test_step(overrides: tuple[str, ...]) -> None:
    words = [*SMALL, "--baseline", "--repeats", "1", "--precision", "fp32", "--accumulate", "2"]
    result = step.measure(parsed(step, *words, *overrides))
    assert_ratios(result)
    tokens = 2 * 2 * 32
    assert result["tokens_per_second"] == pytest.approx(tokens / result["seconds"])
    assert result["flops_per_token"] == pytest.approx(result["flops_required"] / tokens)
    # All that the two counts differ by is the head on the rows without a loss: products of width
    # 128 with 300 tokens, forward and twice backward.
    without_loss = tokens - result["rows"]
    assert (without_loss == 0) == bool(overrides)
    saved = result["flops_dense"] - result["flops_required"]
    assert saved == pytest.approx(6 * 128 * 300 * without_loss)
    achieved = result["flops_required"] / result["seconds"]
    share = achieved / result["measured_matmul_flops_per_second"]
    assert result["mfu_of_measured_matmul"] == pytest.approx(share)


def test_optimizer() -> None:
    result = optimizer.measure(parsed(optimizer, *SMALL, "--baseline", "--repeats", "1"))
    assert_ratios(result)
    # 1,027,072 beside 300 + 1 states in the embedding and, with a bias, in the head.
    assert result["parameters"] == 1_027_072 + 301 * 128 * 2 + 301
    assert result["bytes_per_second"] == pytest.approx(36 * result["parameters_per_second"])


def test_data(tmp_path: Path) -> None:
    arguments = parsed(
        data,
        "--num-blocks",
        "64",
        "--block-length",
        "16",
        "--batch-size",
        "4",
        "--rank-batch-size",
        "8",
        "--seconds",
        "0.1",
    )
    result = data.measure(arguments, data.write_dataset(arguments, tmp_path))
    assert result["blocks"] >= 64
    assert result["tokens_per_second"] == pytest.approx(8 * 16 / result["seconds"])
    assert result["read_tokens_per_second"] > 0
    assert result["seconds_to_first_batch"] > 0
    assert result["resident_mb"] >= result["extra_mb"]


def test_communication_sends_no_more_than_it_must() -> None:
    """Layouts of two processes; each is charged what it sends, byte by byte."""
    layouts = ["TP2 SP", "DP2 ZeRO 1", "DP2 ZeRO 1 bf16", "PP2", "TP2 Muon", "DP2 ZeRO 3 Muon"]
    chosen = [word for name in layouts for word in ("--layout", name)]
    finished = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "sedd_scale",
                "benchmark",
                "communication",
                *chosen,
                *SMALL,
                "--json",
            ),
            "model.num_layers=2",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    lines = {line["layout"]: line for line in result["layouts"]}
    assert list(lines) == layouts
    assert result["all_within"]
    for line in lines.values():
        assert line["bytes_sent"] == pytest.approx(sum(line["by_collective"].values()))
        assert 0.999 < line["ratio"] < communication.ALLOWED
    # Of two ranks each sends half of the matrices' momentum, and half of what comes of it.
    for name in ("TP2 Muon", "DP2 ZeRO 3 Muon"):
        exchanged = lines[name]["by_collective"]["all-to-all (several)"]
        assert exchanged == pytest.approx(2 * 12 * 128**2 * 4 / 2, rel=1e-3)
    # By hand: half of the gradient out and half of the weights back, at 4 bytes a number.
    moved = lines["DP2 ZeRO 1"]["by_collective"]
    parameters = 2 * (2 * 128**2 * 6 + 3 * 128 + 6 * 128 * 65 + 512)
    parameters += 256 * 64 + 64 + 64**2 + 64 + 128 + 2 * 128 * 65 + 301 * 257
    assert moved["all-gather (data)"] == pytest.approx(2 * parameters, rel=1e-4)
    assert moved["reduce (data)"] == pytest.approx(2 * parameters, rel=1e-4)
