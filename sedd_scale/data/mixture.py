"""Which dataset each sample of a run comes from: exact shares, changed at step boundaries.

Sample s of a stage belongs to one of the stage's datasets. The shares are exact over any stretch of
samples: after n samples dataset i has given within a few samples of n times its weight. Both the
dataset and how many of its samples came before are computed from s alone, so that a run resumes
anywhere without state.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.errors import ConfigError

# Shares are kept in units of 2^-SHARE_BITS, so that share times sample fits 63 bits.
SHARE_BITS = 20


class Stage(NamedTuple):
    """From this sample on, these weights; any positive scale, zero for a dataset at rest."""

    first_sample: int
    weights: tuple[float, ...]


class MixturePlan:
    """The datasets of all samples of a run.

    Args:
        stages: in order of their first samples, the first at 0; equally many weights in each.

    Raises:
        ConfigError: weights that are negative, all zero, or too small beside the others.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        assert stages and stages[0].first_sample == 0
        self.num_datasets = len(stages[0].weights)
        self._begins = np.array([stage.first_sample for stage in stages], dtype=np.int64)
        assert np.all(np.diff(self._begins) > 0)
        self._splits = [_share_of_first(stage.weights) for stage in stages]
        # Samples that each dataset gave before each stage.
        self._given = np.zeros((len(stages), self.num_datasets), dtype=np.int64)
        for number in range(1, len(stages)):
            length = self._begins[number] - self._begins[number - 1]
            self._given[number] = self._given[number - 1] + self._counts(number - 1, int(length))

    def assign(self, sample_ids: npt.ArrayLike) -> tuple[IntArray, IntArray]:
        """The dataset of each sample, and its number among that dataset's samples of the run."""
        samples = np.asarray(sample_ids, dtype=np.int64)
        if self.num_datasets == 1:
            return np.zeros_like(samples), samples
        datasets, numbers = np.empty_like(samples), np.empty_like(samples)
        stage_of = np.searchsorted(self._begins, samples, side="right") - 1
        for stage in np.unique(stage_of).tolist():
            here = stage_of == stage
            place = samples[here] - self._begins[stage]
            dataset = np.full_like(place, self.num_datasets - 1)
            undecided = np.ones(place.shape, dtype=np.bool_)
            # Peel off one dataset after the other: place becomes the place among the others.
            for number, share in enumerate(self._splits[stage]):
                before = _taken(place, share)
                taken = undecided & (_taken(place + 1, share) > before)
                dataset[taken] = number
                place = np.where(taken, before, np.where(undecided, place - before, place))
                undecided &= ~taken
            datasets[here] = dataset
            numbers[here] = place + self._given[stage][dataset]
        return datasets, numbers

    def given(self, num_samples: int) -> IntArray:
        """How many of the run's first samples came from each dataset."""
        stage = int(np.searchsorted(self._begins, num_samples, side="right")) - 1
        length = num_samples - int(self._begins[stage])
        return self._given[stage] + self._counts(stage, length)

    def _counts(self, stage: int, length: int) -> IntArray:
        """Samples of each dataset among the first of a stage."""
        counts = []
        left = np.array(length, dtype=np.int64)
        for share in self._splits[stage]:
            taken = _taken(left, share)
            counts.append(int(taken))
            left = left - taken
        return np.array([*counts, int(left)], dtype=np.int64)


def _taken(place: IntArray, share: int) -> IntArray:
    """Of the first `place` samples, those that go to a dataset of this share; rounded."""
    taken: IntArray = (place * share + (1 << (SHARE_BITS - 1))) >> SHARE_BITS
    return taken


def _share_of_first(weights: Sequence[float]) -> list[int]:
    """For each dataset but the last its share among itself and those after it, in 2^-SHARE_BITS."""
    if min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(f"weights {list(weights)} of data.mixture: give positive numbers")
    shares = []
    for number in range(len(weights) - 1):
        rest = sum(weights[number:])
        share = round(weights[number] / rest * (1 << SHARE_BITS)) if rest > 0 else 0
        if weights[number] > 0 and share == 0:
            raise ConfigError(
                f"weight {weights[number]} of data.mixture is less than a millionth of {rest}: "
                "give a larger one, or leave the dataset out"
            )
        shares.append(share)
    return shares
