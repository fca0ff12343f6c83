"""Keyed corruption: every draw is a pure function of (seed, stream, step, global sample index).

Whoever makes sample 37 of step 900 makes the same noisy tokens: every tensor-parallel peer, both
ends of a pipeline, a resumed run, a run under another layout. Draws come from the counter-based
Philox generator, with the seed and the name of the stream as its key and (step, sample) in its
counter, and from its raw words only, whose values numpy keeps fixed from release to release.

Times are stratified over the whole global batch: [0, 1) is cut into as many strata as the batch has
samples and each sample takes a different one, so that the loss varies less and does not depend on
how the batch is split.
"""

import functools
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SampleIds = Tensor | npt.NDArray[np.int64] | Sequence[int]

_WORD = 2**64
# The word of the counter that names the sample, where a draw belongs to the whole batch.
_WHOLE_BATCH = _WORD - 1


class NoisyBatch(NamedTuple):
    """A corrupted batch on the host: int64 tokens, float64 noise."""

    noisy_BL: Tensor
    clean_BL: Tensor
    t_B: Tensor
    """Time in [t_min, 1]."""
    noise_B3: Tensor
    """The three below."""
    dropout_key_B: Tensor
    """Int64 in [0, 2^31): seeds what else is random about the sample."""

    @property
    def sigma_B(self) -> Tensor:
        """Total noise, nats."""
        return self.noise_B3[:, 0]

    @property
    def rate_B(self) -> Tensor:
        """d sigma / dt."""
        return self.noise_B3[:, 1]

    @property
    def rate_over_expm1_B(self) -> Tensor:
        """rate / (e^sigma - 1)."""
        return self.noise_B3[:, 2]

    def part(self, samples: slice) -> "NoisyBatch":
        """Some of its samples."""
        return NoisyBatch(*(values[samples] for values in self))


def keyed_words(
    count: int, *, seed: int, stream: str, step: int, sample: int | None = None
) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words of a stream at a step, for a sample or (None) the whole batch."""
    state = _state(seed, stream, step)
    state["state"]["counter"][2] = _WHOLE_BATCH if sample is None else sample % _WORD
    generator = _generator_of_thread()
    generator.state = state
    return generator.random_raw(count)


def keyed_rows(
    count: int, *, seed: int, stream: str, step: int, sample_ids_B: SampleIds
) -> npt.NDArray[np.uint64]:
    """The `keyed_words` of several samples, [B, count], much faster than one after the other."""
    ids_B = _as_ids(sample_ids_B)
    words = np.empty((len(ids_B), count), dtype=np.uint64)
    state = _state(seed, stream, step)
    counter = state["state"]["counter"]
    generator = _generator_of_thread()
    size = None if count == 1 else count
    for row, sample in enumerate(ids_B.tolist()):
        counter[2] = sample
        generator.state = state
        words[row] = generator.random_raw(size)
    return words


def _state(seed: int, stream: str, step: int) -> Any:
    """The state of a new Philox generator, in lists: it takes those faster than arrays."""
    # The first word of the counter counts blocks of output within a draw, so no two draws overlap;
    # the third one names the sample.
    counter = [0, 0, 0, step % _WORD]
    return {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": [seed % _WORD, _word_of(stream)]},
        "buffer": [0] * 4,
        "buffer_pos": 4,  # nothing is left in it
        "has_uint32": 0,
        "uinteger": 0,
    }


@functools.lru_cache(maxsize=256)
def _word_of(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


_threads = threading.local()


def _generator_of_thread() -> np.random.Philox:
    """One generator that is put to any place: to make one takes longer than to draw a row."""
    if not hasattr(_threads, "generator"):
        _threads.generator = np.random.Philox(0)
    generator: np.random.Philox = _threads.generator
    return generator


def keyed_uniforms(
    count: int, *, seed: int, stream: str, step: int, sample: int | None = None
) -> npt.NDArray[np.float64]:
    """`count` float64 uniforms in [0, 1) with 53 random bits each; arguments as `keyed_words`."""
    return _uniforms(keyed_words(count, seed=seed, stream=stream, step=step, sample=sample))


def _uniforms(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    words >>= np.uint64(11)
    uniforms = words.astype(np.float64)
    uniforms *= 2.0**-53
    return uniforms


@dataclass(frozen=True)
class Draw:
    """Samples of a step, and what every random number of theirs is keyed by.

    A sample's place in its batch is its id modulo `global_batch`, so the ids of a step must be
    distinct modulo `global_batch`, as consecutive ids are.

    Attributes:
        sample_ids: global indices of the samples, [B].
        global_batch: samples of the step in all.
        stream: separates uses that share a seed; "train" alone is training.
    """

    seed: int
    step: int
    sample_ids: SampleIds
    global_batch: int
    stream: str = "train"

    def __post_init__(self) -> None:
        assert self.global_batch > 0, self.global_batch
        object.__setattr__(self, "sample_ids", _as_ids(self.sample_ids))

    def __len__(self) -> int:
        return len(self.sample_ids)

    def part(self, samples: slice) -> "Draw":
        """The same of some of its samples."""
        return replace(self, sample_ids=self.sample_ids[samples])

    def words(self, count: int, purpose: str) -> npt.NDArray[np.uint64]:
        """Random 64-bit words of each sample, [B, count]."""
        return keyed_rows(
            count,
            seed=self.seed,
            stream=f"{self.stream}/{purpose}",
            step=self.step,
            sample_ids_B=self.sample_ids,
        )

    def uniforms(self, count: int, purpose: str) -> npt.NDArray[np.float64]:
        """Float64 uniforms in [0, 1) of each sample, [B, count], with 53 random bits each."""
        return _uniforms(self.words(count, purpose))

    def times(self, t_min: float) -> Tensor:
        """Times [B] in [t_min, 1), float64: one a stratum over the global batch.

        The strata are dealt by a keyed permutation and share one offset.
        """
        of_step = {"seed": self.seed, "step": self.step}
        order = keyed_words(self.global_batch, stream=f"{self.stream}/strata", **of_step)
        place_B = _as_ids(self.sample_ids) % self.global_batch
        stratum = np.argsort(order, kind="stable")[place_B]
        offset = keyed_uniforms(1, stream=f"{self.stream}/offset", **of_step)[0]
        u_B = (stratum + offset) / self.global_batch
        return torch.from_numpy(t_min + (1.0 - t_min) * u_B)

    def dropout_keys(self) -> Tensor:
        """What else is random about the samples is keyed by these: int64 [B] in [0, 2^31)."""
        keys_B1 = self.words(1, "dropout")
        return torch.from_numpy((keys_B1[:, 0] >> np.uint64(33)).astype(np.int64))


def _as_ids(sample_ids_B: SampleIds) -> npt.NDArray[np.int64]:
    ids_B = np.asarray(sample_ids_B, dtype=np.int64)
    assert ids_B.ndim == 1 and (ids_B.size == 0 or ids_B.min() >= 0), ids_B
    return ids_B
