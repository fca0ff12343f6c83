"""What Inductor makes of the compiled passes for an H100: one kernel, its bytes, one order."""

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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the worker found of each pass, and of a sum over positions as a control."""
    path = tmp_path_factory.mktemp("inductor") / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    worker = Path(__file__).with_name("inductor_worker.py")
    done = subprocess.run(
        [sys.executable, worker, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return found


def test_each_pass_is_a_kernel(found: dict[str, dict[str, Any]]) -> None:
    several = {name: made for name, made in found.items() if made["kernels"] != 1}
    assert not set(several) - {"control", "control by timing"}


def test_no_sum_has_a_shape_that_a_device_chooses_by_timing(
    found: dict[str, dict[str, Any]],
) -> None:
    """Tensor ranks sum the same numbers, each for itself: with one shape in one order."""
    by_timing = found.pop("control by timing")
    shapes = [shapes for made in found.values() for shapes in made["shapes of reductions"]]
    assert set(shapes) == {1}
    assert max(by_timing["shapes of reductions"]) > 1  # so there is something to forbid


def test_bytes_are_those_of_the_model_of_a_step(found: dict[str, dict[str, Any]]) -> None:
    from tests.model.inductor_worker import HEAD, WIDTH

    made = {name: one["bytes"] for name, one in found.items()}
    weight = 2
    trunk = TrunkShape(WIDTH, WIDTH // HEAD, WIDTH // HEAD, HEAD, 4 * WIDTH)
    passes = block_bytes(trunk, residual=2, weight=weight)
    model = {name: size / WIDTH for name, size in passes.items()}
    close = {"rel": 0.01}
    assert 2 * made["norm forward"] == pytest.approx(model["norms forward"], **close)
    gates = made["gate forward"] + made["biased gate forward"]
    assert gates == pytest.approx(model["gates forward"], **close)
    # Of query, key and value together the turns read two thirds.
    turns = made["turns"] - weight
    assert 2 * turns + weight + weight == pytest.approx(model["rotary turns"], **close)
    half = TrunkShape(WIDTH, WIDTH // HEAD, WIDTH // HEAD, HEAD, 2 * WIDTH, gated=True)
    gated = block_bytes(half, residual=2, weight=weight)["activation"] / WIDTH
    assert made["gated forward"] + made["gated backward"] == pytest.approx(gated, **close)
    assert made["GELU forward"] == pytest.approx(model["activation"] * 2 / 5, **close)
