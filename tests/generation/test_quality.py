"""Measures of samples against counting by hand."""

import itertools
import math

import numpy as np
import pytest

from sedd_scale.generation.quality import (
    ORDERS,
    QualityReport,
    distinct_shares,
    format_quality,
    longest_run,
    token_entropy,
)


def test_entropy_of_known_distributions() -> None:
    assert token_entropy(np.array([7])) == 0.0
    assert token_entropy(np.array([7, 7, 7])) == 0.0
    assert token_entropy(np.array([1, 2, 3, 4])) == pytest.approx(math.log(4))
    assert token_entropy(np.array([1, 1, 2, 3])) == pytest.approx(1.5 * math.log(2))


def test_longest_run() -> None:
    for tokens, run in [([], 0), ([5], 1), ([1, 1, 2], 2), ([1, 2, 2, 2], 3), ([1, 2, 1], 1)]:
        assert longest_run(np.array(tokens, dtype=np.int64)) == run


def grams(tokens: list[int], order: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[k : k + order]) for k in range(len(tokens) - order + 1)]


def test_distinct_n_grams_are_those_counted_one_by_one() -> None:
    generator = np.random.default_rng(0)
    # Ids so large that n-grams of them would not fit a machine word side by side.
    samples = [
        (generator.integers(0, 3, size=length) * (2**40 + 1)).tolist()
        for length in (0, 1, 2, 3, 4, 5, 30, 200)
    ]
    report = QualityReport()
    for tokens in samples:
        expected = {}
        for order in ORDERS:
            found = grams(tokens, order)
            expected[order] = len(set(found)) / len(found) if found else None
        assert distinct_shares(np.array(tokens, dtype=np.int64)) == expected
        report.add(tokens)
    result = report.result()
    for order in ORDERS:
        pooled = list(itertools.chain(*(grams(tokens, order) for tokens in samples)))
        assert result["pooled_distinct_n"][str(order)] == len(set(pooled)) / len(pooled)
        shares = [distinct_shares(np.array(tokens, dtype=np.int64))[order] for tokens in samples]
        known = [share for share in shares if share is not None]
        assert result["distinct_n"][str(order)] == pytest.approx(np.mean(known))
        assert result["repeated_n"][str(order)] == pytest.approx(1 - np.mean(known))
    assert (result["samples"], result["pooled_samples"]) == (8, 8)
    assert result["length"] == {"mean": 245 / 8, "min": 0, "max": 200}
    assert result["tokens"] == 245


def test_entropy_over_samples_and_of_all_tokens_together() -> None:
    report = QualityReport()
    report.add([1, 1])
    report.add([2, 3])
    result = report.result()
    assert result["token_entropy"] == pytest.approx(math.log(2) / 2)
    assert result["token_entropy_stderr"] == pytest.approx(math.log(2) / 2)
    assert result["pooled_token_entropy"] == pytest.approx(1.5 * math.log(2))
    assert result["longest_run"] == {"mean": 1.5, "max": 2}


def test_the_pool_is_a_prefix_of_bounded_size() -> None:
    report = QualityReport(pooled_tokens=5)
    for tokens in ([1, 2], [1, 2], [1, 2], [9]):
        report.add(tokens)
    result = report.result()
    assert result["pooled_samples"] == 2
    assert result["pooled_distinct_n"]["1"] == 0.5
    assert result["samples"] == 4


def test_the_table_shows_entropy_beside_a_generative_perplexity() -> None:
    report = QualityReport()
    report.add([1, 2])
    judged = {
        "judge": "a-judge",
        "tokens_scored": 3,
        "mean_of_samples": 12.5,
        "of_corpus": None,
        "samples_unscored": 1,
    }
    table = format_quality({**report.result(), "generative_perplexity": judged})
    assert "0.6931 nats" in table and "12.500 (mean over samples)" in table
    assert "a-judge" in table and "1 samples too short" in table
