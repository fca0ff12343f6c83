"""The benchmark of the loss: both of its sides compute the same, and it reports what it says."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
import torch

from sedd_scale.benchmark.loss import textbook_loss
from sedd_scale.parallel.vocab import linear_score_entropy
from tests.model.small_network import relative
from tests.parallel.vocab_worker import KINDS, make_problem
from tests.repository import ROOT
from tests.tolerance import GRADIENT, NETWORK


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_the_textbook_side_is_the_same_loss(name: str, scaled: bool) -> None:
    problem = make_problem(name, scaled, 50, dtype=torch.float32)
    leaves, expected_leaves = problem.leaves, problem.leaves
    expected = linear_score_entropy(*expected_leaves, problem.targets, problem.shard())
    loss = textbook_loss(
        *leaves,
        problem.clean_BL,
        problem.noisy_BL,
        problem.noise_B3,
        graph=problem.graph,
        scaled=scaled,
        mean=problem.mean,
    )
    torch.testing.assert_close(loss, expected, rtol=NETWORK, atol=0.0)
    loss.backward()
    expected.backward()
    for leaf, same in zip(leaves, expected_leaves):
        assert relative(leaf.grad, same.grad) < GRADIENT


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--unscaled",),
        ("--graph", "uniform", "--precision=bf16"),
        ("--graph", "uniform", "--mean"),
    ],
)
def test_the_command_reports_one_json_object_last(options: tuple[str, ...]) -> None:
    small = ("--block-length=32", "--vocab-size=1000", "--width=64", "--repeats=1", "--threads=1")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sedd_scale",
            "benchmark",
            "loss",
            "--baseline",
            "--json",
            *small,
            *options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    rows = 64 if "uniform" in options else 32
    assert report["rows"] == rows
    assert report["flops_required"] == 6 * 1000 * 64 * rows
    assert report["flops_dense"] == 6 * 1000 * 64 * 64
    assert report["speedup"] == pytest.approx(report["baseline_seconds"] / report["seconds"])
    assert report["tokens_per_second"] == pytest.approx(64 / report["seconds"])
    assert report["loss"] == pytest.approx(report["baseline_loss"], rel=1e-3)
    if "uniform" not in options:
        assert 0 < report["extra_mb"] < report["baseline_extra_mb"]
    assert report["device"] and report["versions"]["torch"] == importlib.metadata.version("torch")
