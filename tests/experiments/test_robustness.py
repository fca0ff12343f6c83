"""Damage comes at its rate and of its kind, and one command reports what it costs."""

import json
from pathlib import Path

import pytest
import torch

from sedd_scale.__main__ import main
from sedd_scale.experiments.known_source import chain_law, damaged, drawn


def forbidden(sequences_BL: torch.Tensor) -> float:
    """How many of the steps from one token to the next the source never takes."""
    _, follow_NN = chain_law()
    return float((follow_NN[sequences_BL[:, :-1], sequences_BL[:, 1:]] == 0).double().mean())


def test_damage_has_its_rate() -> None:
    whole = drawn(4000, torch.Generator().manual_seed(0))
    noisy = damaged("noise", 0.2)(4000, torch.Generator().manual_seed(0))
    # A random token is the old one in a quarter of all cases.
    assert float((noisy != whole).double().mean()) == pytest.approx(0.15, abs=0.015)
    assert forbidden(whole) == 0.0 and forbidden(noisy) > 0.03
    # With a token missing between them, tokens follow that never do.
    gaps = damaged("missing", 0.3)(4000, torch.Generator().manual_seed(1))
    assert gaps.shape == whole.shape and forbidden(gaps) > 0.03
    for kind in ("noise", "missing"):
        assert forbidden(damaged(kind, 0.0)(4000, torch.Generator().manual_seed(2))) == 0.0


def test_one_command_reports_the_errors(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--steps", "2", "--graphs", "absorb"]
    assert main(["experiment", "robustness", *arguments, "--rates", "0", "0.5"]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["damage"], row["rate"]) for row in rows] == [
        ("noise", 0.0), ("noise", 0.5), ("missing", 0.0), ("missing", 0.5),
    ]  # fmt: skip
    assert rows[0]["log_error"] != rows[1]["log_error"]
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["experiment", "robustness", *arguments, "--rates", "1.5"]) == 2
