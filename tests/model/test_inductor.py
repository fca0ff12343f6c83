"""What Inductor makes of the compiled passes for an H100: kernels, bytes, sums of one order."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.config import TrunkShape
from sedd_scale.planning.step_time import block_bytes
from tests.repository import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# Of each pass; a sum over all rows has a small kernel of its own.
MOST_KERNELS = {
    "norm forward": 1,
    "gate forward": 1,
    "gate backward": 1,
    "biased gate forward": 1,
    "biased gate backward": 2,
    "GELU forward": 1,
    "GELU backward": 2,
    "row hashes": 1,
    "turns": 1,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the worker found: for the option that training uses, and without it."""
    path = tmp_path_factory.mktemp("inductor") / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    worker = Path(__file__).with_name("inductor_worker.py")
    done = subprocess.run(
        [sys.executable, worker, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


def test_each_pass_is_a_kernel_or_few(found: dict[str, dict[str, Any]]) -> None:
    for name, made in found["deterministic"].items():
        assert 1 <= made["kernels"] <= MOST_KERNELS[name], (name, made)


def test_no_sum_has_a_shape_that_a_device_chooses_by_timing(
    found: dict[str, dict[str, Any]],
) -> None:
    """Tensor ranks sum the same numbers, each for itself: with one shape in one order."""

    def shapes(option: str) -> list[int]:
        of_passes = found[option].values()
        return [shapes for made in of_passes for shapes in made["shapes of reductions"]]

    assert set(shapes("deterministic")) == {1}
    assert max(shapes("by timing")) > 1  # so there is something to forbid


def test_bytes_are_those_of_the_model_of_a_step(found: dict[str, dict[str, Any]]) -> None:
    from tests.model.inductor_worker import HEAD, WIDTH

    made = {name: one["bytes"] for name, one in found["deterministic"].items()}
    weight = 2
    trunk = TrunkShape(WIDTH, WIDTH // HEAD, WIDTH // HEAD, HEAD, 4 * WIDTH)
    passes = block_bytes(trunk, residual=2, weight=weight)
    model = {name: size / WIDTH for name, size in passes.items()}
    close = {"rel": 0.01}
    assert 2 * made["norm forward"] == pytest.approx(model["norms forward"], **close)
    gates = made["gate forward"] + made["biased gate forward"]
    assert gates == pytest.approx(model["gates forward"], **close)
    gates = made["gate backward"] + made["biased gate backward"]
    assert gates == pytest.approx(model["gates backward"], **close)
    # Of query, key and value together the turns read two thirds.
    turns = made["turns"] - weight
    assert 2 * turns + weight + weight == pytest.approx(model["rotary turns"], **close)
    assert made["GELU forward"] + made["GELU backward"] == pytest.approx(model["GELU"], **close)
