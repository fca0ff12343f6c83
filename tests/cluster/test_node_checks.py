"""What makes a node bad, and what this one says of itself."""

from pathlib import Path
from typing import Any

import pytest

from sedd_scale.cluster.node_checks import Limits, examine_node, expected_devices, problems_of

LIMITS = Limits(memory_gb=10.0, disk_gb=5.0, skew=2.0)
GOOD: dict[str, Any] = {
    "devices_expected": 8,
    "devices": 8,
    "device_free_share": 0.99,
    "memory_gb": 500.0,
    "disk_gb": 100.0,
    "same_folder": True,
    "skew": 0.5,
    "skew_error": 0.001,
}


def test_a_good_node_has_no_problem() -> None:
    assert problems_of(GOOD, LIMITS) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"devices": 7}, "7 of 8 GPUs"),
        ({"device_error": "GPU 3: an illegal address"}, "GPU 3"),
        ({"device_free_share": 0.4}, "40%"),
        ({"memory_gb": 9.0}, "9.0 GB of memory"),
        ({"disk_gb": 4.0}, "4.0 GB of disk"),
        ({"error": "cannot use /runs: Read-only file system"}, "Read-only"),
        ({"same_folder": False}, "does not see"),
        ({"skew": -3.0}, "-3.0 s"),
    ],
)
def test_each_fault_is_named(change: dict[str, Any], word: str) -> None:
    (problem,) = problems_of({**GOOD, **change}, LIMITS)
    assert word in problem


def test_an_uncertain_clock_gets_the_benefit_of_the_doubt() -> None:
    assert problems_of({**GOOD, "skew": 3.0, "skew_error": 1.5}, LIMITS) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"SLURM_GPUS_ON_NODE": "8", "LOCAL_WORLD_SIZE": "8"}, 8),
        (
            {"SLURM_GPUS_ON_NODE": "8", "LOCAL_WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "5"},
            1,
        ),
    ],
)
def test_gpus_that_slurm_allotted_are_expected(environment: dict[str, str], expected: int) -> None:
    assert expected_devices(environment) == expected


def test_this_machine_is_measured_and_left_clean(tmp_path: Path) -> None:
    report = examine_node(tmp_path, {})
    assert "error" not in report and report["disk_gb"] > 0 and report["memory_gb"] > 0.1
    assert list(tmp_path.iterdir()) == []
    missing = examine_node(tmp_path / "gone", {})
    assert "gone" in missing["error"] and problems_of(missing, Limits(0.0, 0.0, 1.0))
