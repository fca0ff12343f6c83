"""Mixtures: shares are exact at every step, stages change them, nothing depends on state."""

import numpy as np
import pytest

from sedd_scale.data.mixture import MixturePlan, Stage
from sedd_scale.errors import ConfigError

PLANS = {
    "one": [Stage(0, (1.0,))],
    "even": [Stage(0, (1.0, 1.0))],
    "three": [Stage(0, (0.7, 0.2, 0.1))],
    "stages": [
        Stage(0, (3.0, 1.0, 0.0)),
        Stage(1000, (1.0, 1.0, 1.0)),
        Stage(4321, (0.0, 0.001, 5.0)),
    ],
}


@pytest.mark.parametrize("name", PLANS)
def test_each_dataset_gives_its_samples_in_order(name: str) -> None:
    plan = MixturePlan(PLANS[name])
    datasets, numbers = plan.assign(np.arange(20_000))
    for dataset in range(plan.num_datasets):
        mine = numbers[datasets == dataset]
        assert np.array_equal(mine, np.arange(len(mine)))
    for samples in (0, 1, 7, 999, 1000, 1001, 4320, 4321, 12_345):
        counts = np.bincount(datasets[:samples], minlength=plan.num_datasets)
        assert np.array_equal(plan.given(samples), counts)


@pytest.mark.parametrize("name", PLANS)
def test_shares_are_exact_over_any_stretch(name: str) -> None:
    stages = PLANS[name]
    plan = MixturePlan(stages)
    datasets, _ = plan.assign(np.arange(10_000))
    ends = [*(stage.first_sample for stage in stages[1:]), 10_000]
    for stage, end in zip(stages, ends):
        part = datasets[stage.first_sample : end]
        for dataset, weight in enumerate(stage.weights):
            share = weight / sum(stage.weights)
            drift = np.cumsum(part == dataset) - share * np.arange(1, len(part) + 1)
            # Rounding once for each dataset, and shares kept to a millionth.
            assert np.abs(drift).max() <= len(stage.weights) + 0.02


def test_any_sample_alone_and_far_away() -> None:
    plan = MixturePlan(PLANS["stages"])
    samples = np.random.default_rng(0).integers(0, 10**12, 500)
    datasets, numbers = plan.assign(samples)
    for place in range(0, 500, 50):
        one = plan.assign([samples[place]])
        assert (one[0][0], one[1][0]) == (datasets[place], numbers[place])
    assert (numbers >= 0).all()
    shares = plan.given(10**12) / 10**12
    assert shares == pytest.approx([0, 0.001 / 5.001, 5 / 5.001], abs=2e-6)


def test_a_later_stage_changes_nothing_before_it() -> None:
    first, both = MixturePlan(PLANS["stages"][:1]), MixturePlan(PLANS["stages"])
    samples = np.arange(1000)
    for one, other in zip(first.assign(samples), both.assign(samples)):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.0, 0.0), (1e-9, 1.0)])
def test_weights_that_cannot_be(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture"):
        MixturePlan([Stage(0, weights)])
