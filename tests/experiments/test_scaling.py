"""The fit against known laws, equal compute, and the report; the runs are those of test_compare."""

import json
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.__main__ import main
from sedd_scale.commands.experiment import build_scaling_parser
from sedd_scale.experiments.scaling import (
    OBJECTIVES,
    fit_power_law,
    flops_per_token,
    summarise,
    variants_of,
    write_report,
)


def test_the_fit_finds_a_law_and_its_error_is_its_scatter() -> None:
    sizes = np.array([1e4, 3e4, 1e5, 3e5])
    exact = fit_power_law(sizes, 7.0 * sizes**-0.08)
    assert exact.factor == pytest.approx(7.0) and exact.exponent == pytest.approx(0.08)
    assert exact.stderr == pytest.approx(0.0, abs=1e-9)
    generator = np.random.default_rng(0)
    fits = [
        fit_power_law(sizes, 7.0 * sizes**-0.08 * np.exp(0.02 * generator.standard_normal(4)))
        for _ in range(2000)
    ]
    found = np.array([fit.exponent for fit in fits])
    claimed = np.sqrt(np.mean([fit.stderr**2 for fit in fits]))
    assert found.mean() == pytest.approx(0.08, abs=0.001)
    assert found.std() == pytest.approx(claimed, rel=0.08)


def test_all_sizes_have_the_same_compute() -> None:
    arguments = build_scaling_parser().parse_args(["--data", "d", "--output", "o"])
    spent = {}
    for name, config in variants_of(arguments).items():
        config.validate(1)
        model = config.model
        spent[name] = config.training.steps * flops_per_token(
            model.hidden_size, model.num_layers, arguments.block_length
        )
    assert len(spent) == 3 * len(OBJECTIVES)
    assert max(spent.values()) / min(spent.values()) < 1.01


def test_the_report_has_a_law_for_each_objective(tmp_path: Path) -> None:
    results = [
        {
            "variant": f"{objective}-{width}",
            "seed": seed,
            "train_seconds": 1.0,
            "evaluation": {"bits_per_char": level - 0.002 * width + 0.01 * seed},
        }
        for objective, level in zip(OBJECTIVES, (2.5, 3.2))
        for width in (64, 96, 128)
        for seed in (0, 1)
    ]
    write_report(summarise(results), tmp_path, "command")
    laws = json.loads((tmp_path / "report.json").read_text())["power_laws"]
    assert laws["autoregressive"]["exponent"] > laws["score_entropy"]["exponent"] > 0
    assert laws["autoregressive"]["stderr"] > 0
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    few = ["--data", "d", "--output", str(tmp_path), "--widths", "64", "96"]
    assert main(["experiment", "scaling", *few]) == 2
