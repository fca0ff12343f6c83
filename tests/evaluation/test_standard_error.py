"""Student's quantile and the two standard errors, against scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from sedd_scale.evaluation.standard_error import estimate_from_replicates, student_quantile_95


@pytest.mark.parametrize("freedom", [1.0, 1.7, 2.0, 5.0, 30.0, 400.0, 1e5, 1e9, math.inf])
def test_quantile_is_students(freedom: float) -> None:
    expected = stats.norm.ppf(0.975) if freedom > 1e8 else stats.t.ppf(0.975, freedom)
    assert student_quantile_95(freedom) == pytest.approx(expected, rel=2e-4)


def test_intervals_cover_where_blocks_vary_by_different_amounts() -> None:
    generator = np.random.default_rng(0)
    truth_n = np.array([3.0, -1.0, 0.5, 2.0])
    spread_n = np.array([0.1, 1.0, 3.0, 0.01])
    covered = []
    errors = []
    for _ in range(3000):
        noise = generator.standard_normal((4, 3)) * spread_n[:, None]
        estimate = estimate_from_replicates(truth_n[:, None] + noise)
        errors.append(estimate.mean - truth_n.mean())
        covered.append(estimate.ci95[0] <= truth_n.mean() <= estimate.ci95[1])
    assert 0.93 <= np.mean(covered) <= 0.99
    exact = math.sqrt((spread_n**2 / 3).sum()) / 4
    assert np.std(errors) == pytest.approx(exact, rel=0.05)
    assert estimate.stderr_text == pytest.approx(np.std([3, -1, 0.5, 2], ddof=1) / 2, rel=0.8)


def test_a_single_block_has_no_error_over_text() -> None:
    assert estimate_from_replicates(np.array([[1.0, 2.0]])).stderr_text is None


def test_equal_replicates_have_no_error() -> None:
    estimate = estimate_from_replicates(np.full((2, 3), 1.5))
    assert estimate.ci95 == (1.5, 1.5) and estimate.stderr == 0.0
