"""What samples look like in numbers: entropy, distinct n-grams, repetition, runs and lengths.

None of these says that a text is good; each shows a way in which samples fail that perplexity alone
rewards. Text that repeats itself, or is drawn at a low temperature, has a low entropy and a low
generative perplexity at once (arXiv 2409.02908), so token entropy is always reported beside it.
"""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray

ORDERS = (1, 2, 3, 4)
POOLED_TOKENS = 2**22


def token_entropy(tokens_L: IntArray) -> float:
    """Entropy in nats of the distribution of a sample's tokens, their order ignored."""
    return _entropy(np.unique(tokens_L, return_counts=True)[1])


def distinct_shares(tokens_L: IntArray) -> dict[int, float | None]:
    """Number of different n-grams over the number of n-grams, for each n of `ORDERS`.

    None where the sample has no n-gram. One less this is the share of n-grams that repeat an
    earlier one, seq-rep-n of arXiv 1908.04319, section 6.

    Source: distinct-n of arXiv 1510.03055, section 5.
    """
    shares = {}
    for order, grams in _grams(tokens_L, np.zeros(len(tokens_L), dtype=np.int64)):
        shares[order] = len(np.unique(grams)) / len(grams) if len(grams) else None
    return shares


def longest_run(tokens_L: IntArray) -> int:
    """The most equal tokens in a row."""
    if not len(tokens_L):
        return 0
    ends = np.flatnonzero(np.diff(tokens_L) != 0)
    return int(np.diff(np.concatenate([[-1], ends, [len(tokens_L) - 1]])).max())


class QualityReport:
    """Adds up samples one at a time; of each it keeps a few numbers, of the first their tokens.

    n-grams of different samples are compared in a pool of the first samples, of at most
    `pooled_tokens` tokens: the share of distinct ones falls with the size of what is compared, so
    it comes with that size.
    """

    def __init__(self, pooled_tokens: int = POOLED_TOKENS) -> None:
        self._pooled_limit = pooled_tokens
        self._pool: list[IntArray] = []
        self._pool_open = True
        self._pooled = 0
        self._counts: dict[int, int] = {}
        self._lengths, self._runs = array("q"), array("q")
        self._entropies = array("d")
        self._distinct = {order: array("d") for order in ORDERS}

    def add(self, tokens: Iterable[int]) -> None:
        """Count one sample."""
        tokens_L = np.fromiter(tokens, dtype=np.int64)
        values, counts = np.unique(tokens_L, return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist()):
            self._counts[value] = self._counts.get(value, 0) + count
        self._lengths.append(len(tokens_L))
        self._entropies.append(_entropy(counts))
        self._runs.append(longest_run(tokens_L))
        for order, share in distinct_shares(tokens_L).items():
            if share is not None:
                self._distinct[order].append(share)
        self._pool_open = self._pool_open and self._pooled + len(tokens_L) <= self._pooled_limit
        if self._pool_open:
            self._pool.append(tokens_L)
            self._pooled += len(tokens_L)

    def result(self) -> dict[str, Any]:
        """The report, of plain values.

        samples, tokens; length (tokens; mean, min, max); token_entropy (nats; mean and standard
        error over samples); pooled_token_entropy (nats, of all tokens together); distinct_n and
        repeated_n (mean over samples); pooled_distinct_n over the first `pooled_samples`;
        longest_run (tokens; mean, max). None where there is nothing to measure.
        """
        pooled = {}
        if self._pool:
            tokens = np.concatenate(self._pool)
            owner = np.repeat(np.arange(len(self._pool)), [len(part) for part in self._pool])
            for order, grams in _grams(tokens, owner):
                pooled[order] = len(np.unique(grams)) / len(grams) if len(grams) else None
        distinct = {order: _mean(self._distinct[order]) for order in ORDERS}
        counts = np.array(list(self._counts.values()), dtype=np.int64)
        return {
            "samples": len(self._lengths),
            "tokens": sum(self._lengths),
            "length": {
                "mean": _mean(self._lengths),
                "min": min(self._lengths, default=None),
                "max": max(self._lengths, default=None),
            },
            "token_entropy": _mean(self._entropies),
            "token_entropy_stderr": _stderr(self._entropies),
            "pooled_token_entropy": _entropy(counts),
            "distinct_n": {str(order): share for order, share in distinct.items()},
            "repeated_n": {
                str(order): None if share is None else 1 - share
                for order, share in distinct.items()
            },
            "pooled_distinct_n": {str(order): pooled.get(order) for order in ORDERS},
            "pooled_samples": len(self._pool),
            "longest_run": {"mean": _mean(self._runs), "max": max(self._runs, default=None)},
        }


def format_quality(report: Mapping[str, Any]) -> str:
    """The report for people; with the judge's perplexities where it has them."""
    length = report["length"]
    stderr = report["token_entropy_stderr"]
    rows = [
        ("samples", f"{report['samples']:,}"),
        ("tokens", f"{report['tokens']:,}"),
        ("length", f"{length['mean']:.1f} ({length['min']} to {length['max']})"),
        (
            "token entropy",
            f"{report['token_entropy']:.4f} nats"
            + ("" if stderr is None else f" ± {stderr:.4f}")
            + f", all tokens together {report['pooled_token_entropy']:.4f}",
        ),
        ("distinct-n", f"{_by_order(report['distinct_n'])} (within a sample)"),
        (
            "",
            f"{_by_order(report['pooled_distinct_n'])} (over {report['pooled_samples']:,} samples)",
        ),
        ("repeated n-grams", f"{_by_order(report['repeated_n'])} (within a sample)"),
        (
            "longest run",
            f"{report['longest_run']['mean']:.1f} tokens, at most {report['longest_run']['max']}",
        ),
    ]
    if report.get("prompts_skipped"):
        rows.append(("prompts skipped", f"{report['prompts_skipped']:,}"))
    judged = report.get("generative_perplexity")
    if judged is not None:
        rows += [
            ("judge", f"{judged['judge']}, {judged['tokens_scored']:,} of its tokens scored"),
            ("gen. perplexity", f"{_number(judged['mean_of_samples'])} (mean over samples)"),
            ("", f"{_number(judged['of_corpus'])} (exp of the mean over all tokens)"),
        ]
        if judged["samples_unscored"]:
            rows.append(("", f"{judged['samples_unscored']:,} samples too short to score"))
    return "\n".join(f"{name:18}{value}" for name, value in rows)


def _grams(tokens_L: IntArray, owner_L: IntArray) -> Iterable[tuple[int, IntArray]]:
    """For each n of `ORDERS`, a number for each n-gram that lies in one sample; equal if equal."""
    ranks = np.unique(tokens_L, return_inverse=True)[1].astype(np.int64).reshape(-1)
    base = int(ranks.max(initial=0)) + 1
    grams = ranks
    for order in ORDERS:
        if order > 1:
            # Ranks of shorter n-grams, so that the numbers stay small whatever the vocabulary.
            grams = np.unique(grams, return_inverse=True)[1].astype(np.int64).reshape(-1)
            grams = grams[:-1] * base + ranks[order - 1 :]
        yield order, grams[owner_L[: len(grams)] == owner_L[len(owner_L) - len(grams) :]]


def _entropy(counts: npt.NDArray[np.integer[Any]]) -> float:
    share = counts / counts.sum() if len(counts) else counts
    return float(-(share * np.log(share)).sum()) if len(counts) > 1 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _by_order(shares: Mapping[str, float | None]) -> str:
    return "  ".join(f"{n}: {'-' if x is None else format(x, '.4f')}" for n, x in shares.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
