"""The true ratios against another way to have them, and that training comes nearer to them."""

import json
import math
from pathlib import Path

import pytest
import torch

from sedd_scale.__main__ import main
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.experiments import GRAPHS
from sedd_scale.experiments.known_source import (
    LENGTH,
    TOKENS,
    exact_ratios,
    source,
)


def test_absorbing_ratios_are_the_source_s_conditionals() -> None:
    """p_t(y) / p_t(x) = p(y | what is visible) e^-sigma / (1 - e^-sigma) at a mask."""
    sigma = torch.tensor(0.7, dtype=torch.float64)
    states_SL, law_S, ratio_SLV = exact_ratios(make_graph("absorb", TOKENS), sigma)
    assert float(law_S.sum()) == pytest.approx(1.0)
    clean_CL, law_C = source()
    scale = math.exp(-0.7) / -math.expm1(-0.7)
    state = int((states_SL == torch.tensor([0, TOKENS, 2])).all(1).nonzero())
    fits_C = (clean_CL[:, 0] == 0) & (clean_CL[:, 2] == 2)
    for token in range(TOKENS):
        chance = law_C[fits_C & (clean_CL[:, 1] == token)].sum() / law_C[fits_C].sum()
        assert float(ratio_SLV[state, 1, token]) == pytest.approx(scale * float(chance))
    assert float(ratio_SLV[state, 1, 3]) == 0.0  # 0 is never followed by 3


def test_uniform_ratios_are_of_neighbours() -> None:
    sigma = torch.tensor(0.7, dtype=torch.float64)
    states_SL, law_S, ratio_SLV = exact_ratios(make_graph("uniform", TOKENS), sigma)
    assert len(states_SL) == TOKENS**LENGTH and float(law_S.min()) > 0
    one, other = (
        int((states_SL == torch.tensor(s)).all(1).nonzero()) for s in ([0, 1, 2], [0, 3, 2])
    )
    assert float(ratio_SLV[one, 1, 3]) == pytest.approx(float(law_S[other] / law_S[one]))
    assert float(ratio_SLV[one, 1, 1]) == pytest.approx(1.0)


def test_training_comes_nearer_to_the_ratios_and_one_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = []
    for steps in (1, 40):
        arguments = ["--output", str(tmp_path / str(steps)), "--steps", str(steps)]
        arguments += ["--schedules", "loglinear"]
        assert main(["experiment", "coverage", *arguments]) == 0
        report = json.loads((tmp_path / str(steps) / "report.json").read_text())
        errors.append({row["graph"]: row for row in report["rows"]})
    for graph in GRAPHS:
        assert errors[1][graph]["log_error"] < 0.9 * errors[0][graph]["log_error"]
    assert errors[1]["absorb"]["outside"] < errors[0]["absorb"]["outside"]
    assert (tmp_path / "40/report.png").read_bytes()[:4] == b"\x89PNG"
    assert "| absorb | loglinear | 0 |" in capsys.readouterr().out
