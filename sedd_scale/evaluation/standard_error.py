"""Mean, standard error and 95% interval of an estimate made of independent replicates a block."""

import math
from typing import NamedTuple

import numpy as np

from sedd_scale.arrays import FloatArray


class Estimate(NamedTuple):
    """A mean over blocks and how sure it is.

    Attributes:
        mean: the estimate.
        stderr: from the draws: how far another seed would land on the same blocks.
        stderr_text: from the blocks: how far other blocks of the same source would land, draws
            included; None for a single block.
        ci95: interval from `stderr` that holds the value of infinitely many draws in 95% of cases.
    """

    mean: float
    stderr: float
    stderr_text: float | None
    ci95: tuple[float, float]


def estimate_from_replicates(values_nR: FloatArray, share_n: FloatArray | None = None) -> Estimate:
    """The mean of n blocks, each estimated R >= 2 times independently and without bias.

    The draws of different blocks are independent too, so the variances of their means add up. The
    interval is Student's with the degrees of freedom of Welch and Satterthwaite, since blocks vary
    by different amounts.

    Args:
        share_n: the share of the mean that is expected of each block, 1 on average, where they are
            not alike: what a block has beyond it, and no more, is error.
    """
    blocks, replicates = values_nR.shape
    assert blocks >= 1 and replicates >= 2, values_nR.shape
    means_n = values_nR.mean(axis=1)
    variance_n = values_nR.var(axis=1, ddof=1) / replicates
    mean = float(means_n.mean())
    total = float(variance_n.sum())
    stderr = math.sqrt(total) / blocks
    squares = float((variance_n**2).sum()) / (replicates - 1)
    freedom = total**2 / squares if squares > 0 else math.inf
    margin = student_quantile_95(freedom) * stderr
    rest_n = means_n if share_n is None else means_n - mean * share_n
    return Estimate(mean, stderr, error_over_blocks(rest_n), (mean - margin, mean + margin))


def error_over_blocks(rest_n: FloatArray) -> float | None:
    """Standard error of a mean over blocks of which each has `rest_n` more than its share."""
    return float(rest_n.std(ddof=1)) / math.sqrt(len(rest_n)) if len(rest_n) > 1 else None


def student_quantile_95(freedom: float) -> float:
    """q with P(|T| < q) = 0.95 for Student's T; `freedom` is real and at least 1.

    With T = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), which is integrated
    numerically; relative error below 1e-4.
    """
    if freedom > 1e6:
        return 1.959964
    root = math.sqrt(freedom)
    angles = np.linspace(0.0, min(math.pi / 2, 10.0 / root), 20_001)
    density = np.cos(angles) ** (freedom - 1.0)
    steps = np.diff(angles) * (density[1:] + density[:-1]) / 2
    cumulative = np.concatenate([[0.0], np.cumsum(steps)])
    return root * math.tan(float(np.interp(0.95 * cumulative[-1], cumulative, angles)))
