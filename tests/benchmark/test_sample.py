"""The benchmark of sampling: both sides follow the same law, and its report fits together."""

import argparse

import pytest
import torch
from scipy import stats

from sedd_scale.benchmark import sample
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import T_END, SamplerSettings
from sedd_scale.sampling.time_grid import time_steps
from tests.evaluation.enumeration import tiny_model


@pytest.mark.parametrize("sampler", ["analytic", "ancestral"])
def test_the_textbook_side_has_the_same_law(sampler: str) -> None:
    model, count, steps = tiny_model("absorb", "loglinear"), 4000, 3
    state_BL = torch.full((count, 2), 3)
    generator = torch.Generator().manual_seed(1)
    for step in time_steps(model.schedule, steps, "uniform", T_END):
        uniform_BL = torch.rand(state_BL.shape, generator=generator, dtype=torch.float64)
        state_BL = sample.textbook_step(model, state_BL, step, uniform_BL, sampler=sampler)
    blank_BL = torch.zeros(count, 2, dtype=torch.int64)
    ours_BL = draw(model, blank_BL, blank_BL.bool(), SamplerSettings(sampler, steps=steps))
    table = [
        torch.bincount(part[:, 0] * 3 + part[:, 1], minlength=9) for part in (state_BL, ours_BL)
    ]
    assert len(table[0]) == len(table[1]) == 9
    assert stats.chi2_contingency(torch.stack(table).numpy()).pvalue > 1e-3


def test_the_report_fits_together() -> None:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser.add_subparsers())
    words = (
        "--model tiny --batch-size 2 --length 16 --vocab-size 2000 --steps 6 --timed-steps 3 "
        "--threads 1"
    )
    result = sample.measure(parser.parse_args(["sample", *words.split()]))
    assert result["speedup"] == pytest.approx(result["baseline_seconds"] / result["seconds"])
    assert result["tokens_per_second"] == pytest.approx(32 / result["seconds"])
    assert 0 < result["extra_mb"] < result["baseline_extra_mb"]
