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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.schedules import Schedule

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


def keyed_uniform_rows(
    count: int, *, seed: int, stream: str, step: int, sample_ids_B: SampleIds
) -> npt.NDArray[np.float64]:
    """The `keyed_uniforms` of several samples, [B, count]."""
    return _uniforms(
        keyed_rows(count, seed=seed, stream=stream, step=step, sample_ids_B=sample_ids_B)
    )


def _uniforms(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    words >>= np.uint64(11)
    uniforms = words.astype(np.float64)
    uniforms *= 2.0**-53
    return uniforms


def stratified_times(
    *,
    seed: int,
    step: int,
    global_batch: int,
    sample_ids_B: SampleIds,
    t_min: float,
    stream: str = "train",
) -> Tensor:
    """Times [B] in [t_min, 1), float64, of samples of a step: one a stratum over the global batch.

    A sample's place in its batch is its id modulo `global_batch`, so the ids of a step must be
    distinct modulo `global_batch`, as consecutive ids are. The strata are dealt by a keyed
    permutation and share one offset.
    """
    assert global_batch > 0, global_batch
    ids_B = _as_ids(sample_ids_B)
    order = keyed_words(global_batch, seed=seed, stream=f"{stream}/strata", step=step)
    stratum = np.argsort(order, kind="stable")[ids_B % global_batch]
    offset = keyed_uniforms(1, seed=seed, stream=f"{stream}/offset", step=step)[0]
    u_B = (stratum + offset) / global_batch
    return torch.from_numpy(t_min + (1.0 - t_min) * u_B)


def corrupt_batch(
    clean_BL: Tensor,
    *,
    sample_ids_B: SampleIds,
    step: int,
    seed: int,
    global_batch: int,
    graph: Graph,
    schedule: Schedule,
    t_min: float,
    t_B: Tensor | None = None,
    time_grid: Callable[[Tensor], Tensor] = lambda t_B: t_B,
    stream: str = "train",
) -> NoisyBatch:
    """Draw times and noise for samples of a step; no draw depends on which others are asked for.

    clean_BL holds token ids on the host, sample_ids_B their global sample indices (see
    `stratified_times`). `t_B` replaces the drawn times; `time_grid` moves times to where they are
    wanted. `stream` separates uses that share a seed, such as training and validation. Raises
    DataError for an id outside the graph's tokens.
    """
    graph.check_tokens(clean_BL)
    clean_BL = clean_BL.long()
    ids_B = _as_ids(sample_ids_B)
    batch, length = clean_BL.shape
    assert ids_B.shape == (batch,), (ids_B.shape, clean_BL.shape)
    if t_B is None:
        t_B = stratified_times(
            seed=seed,
            step=step,
            global_batch=global_batch,
            sample_ids_B=ids_B,
            t_min=t_min,
            stream=stream,
        )
    t_B = time_grid(t_B.double())
    sigma_B = schedule.sigma(t_B)

    def per_token(purpose: str) -> Tensor:
        rows_BL = keyed_uniform_rows(
            length, seed=seed, stream=f"{stream}/{purpose}", step=step, sample_ids_B=ids_B
        )
        return torch.from_numpy(rows_BL)

    noisy_BL = graph.corrupt(
        clean_BL,
        sigma_B,
        per_token("moves"),
        per_token("tokens") if graph.mask_id is None else None,
    )
    return NoisyBatch(
        noisy_BL=noisy_BL,
        clean_BL=clean_BL,
        t_B=t_B,
        noise_B3=torch.stack([sigma_B, schedule.rate(t_B), schedule.rate_over_expm1(t_B)], dim=1),
        dropout_key_B=keyed_dropout_keys(ids_B, seed=seed, step=step, stream=stream),
    )


def keyed_dropout_keys(
    sample_ids_B: SampleIds, *, seed: int, step: int, stream: str = "train"
) -> Tensor:
    """What else is random about samples of a step is keyed by these: int64 [B] in [0, 2^31)."""
    keys_B1 = keyed_rows(
        1, seed=seed, stream=f"{stream}/dropout", step=step, sample_ids_B=sample_ids_B
    )
    return torch.from_numpy((keys_B1[:, 0] >> np.uint64(33)).astype(np.int64))


def _as_ids(sample_ids_B: SampleIds) -> npt.NDArray[np.int64]:
    ids_B = np.asarray(sample_ids_B, dtype=np.int64)
    assert ids_B.ndim == 1 and (ids_B.size == 0 or ids_B.min() >= 0), ids_B
    return ids_B
