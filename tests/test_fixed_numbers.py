"""Losses, bounds and samples of every objective, as they were when they were written down.

A change of the house may not move them. `python -m tests.test_fixed_numbers` writes them anew.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config
from sedd_scale.evaluation.likelihood import evaluate
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from tests.repository import DATA

STORED = DATA / "fixed_numbers.json"
OBJECTIVES = {
    "absorb, scaled": ["graph.name=absorb"],
    "absorb": ["graph.name=absorb", "model.scale_by_sigma=false"],
    "uniform": ["graph.name=uniform"],
    "uniform, mean": ["graph.name=uniform", "model.parametrisation=mean"],
    "masked cross-entropy": ["training.objective=masked_cross_entropy"],
    "d3pm": ["training.objective=d3pm_absorb"],
    "autoregressive": ["training.objective=autoregressive"],
}
SAMPLERS = {"absorb": ("analytic", "euler", "ancestral", "first-hitting", "confidence")}
BY_STEPS = ("analytic", "euler", "ancestral")
STEPS = 3


def numbers_of(name: str, changes: Sequence[str] | None = None) -> dict[str, Any]:
    """Of three training steps, and of the freshly made network a bound and samples."""
    arguments = argparse.Namespace(
        model="tiny",
        vocab_size=29,
        block_length=12,
        batch_size=3,
        accumulate=2,
        overrides=["model.dropout=0.1", "training.precision=fp32", *(changes or OBJECTIVES[name])],
    )
    layout = initialize_layout()
    config = synthetic_config(arguments, world_size=1)
    run = SyntheticRun(config, layout)
    step = run.program(run.engine())
    steps = [step() for _ in range(STEPS)]
    model = ScoreModel(config, 29, layout, block_length=12).eval()
    blocks_nL = torch.arange(24).view(2, 12)
    draws = None if name == "autoregressive" else 4
    found: dict[str, Any] = {
        "losses": [numbers.loss for numbers in steps],
        "grad_norms": [numbers.grad_norm for numbers in steps],
        "bound": evaluate(model, tokens_nL=blocks_nL, draws=draws).nats_per_token,
        "samples": {},
    }
    tokens_BL = torch.arange(12).repeat(2, 1)
    for sampler in samplers_of(name):
        fixed_BL = torch.zeros(2, 12, dtype=torch.bool)
        fixed_BL[1, :3] = True
        steps_of = {"steps": 4} if sampler in BY_STEPS else {}
        settings = SamplerSettings(sampler=sampler, **steps_of)
        found["samples"][sampler] = draw(model, tokens_BL, fixed_BL, settings, seed=5).tolist()
    return found


def samplers_of(name: str) -> tuple[str, ...]:
    if name == "autoregressive":
        return ("left-to-right",)
    return ("analytic", "euler") if name.startswith("uniform") else SAMPLERS["absorb"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_numbers_are_those_written_down(name: str) -> None:
    found, stored = numbers_of(name), json.loads(STORED.read_text())[name]
    # Three steps of AdamW carry a rounding of the first gradient on, as other processors make it.
    for key, tolerance in (("losses", 2e-5), ("grad_norms", 2e-4), ("bound", 1e-6)):
        assert found[key] == pytest.approx(stored[key], rel=tolerance), key
    assert found["samples"] == stored["samples"]


def test_absorb_s_mean_parametrisation_is_masked_cross_entropy() -> None:
    """Weights, losses, bound and samples, whatever the objective is called."""
    changes = ["graph.name=absorb", "model.parametrisation=mean"]
    assert numbers_of("absorb, mean", changes) == numbers_of("masked cross-entropy")


if __name__ == "__main__":
    torch.set_num_threads(1)
    STORED.write_text(json.dumps({name: numbers_of(name) for name in OBJECTIVES}) + "\n")
