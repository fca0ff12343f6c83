"""Many samples over many processes: the same work, cut the same way, on any number of ranks."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from sedd_scale.data.atomic import write_atomically
from sedd_scale.data.tokenizers import Tokenizer
from sedd_scale.errors import DataError
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling.infill import Infill
from sedd_scale.sampling.prompts_file import Prompt
from sedd_scale.sampling.samplers import sample


class Request(NamedTuple):
    """One sample to draw.

    Attributes:
        id: what the output calls it.
        infill: what is given of it.
        seed: of its draws.
        number: which draw of that seed it is.
    """

    id: str | int
    infill: Infill
    seed: int
    number: int


def unconditional_requests(count: int, infill: Infill, seed: int) -> list[Request]:
    """`count` samples, ids 0..count-1."""
    return [Request(number, infill, seed, number) for number in range(count)]


def prompt_requests(prompts: Sequence[Prompt], seed: int) -> list[Request]:
    """All samples of all prompts, in order.

    A prompt with a seed of its own numbers its samples from 0, so that they do not depend on its
    place in the file; the others share `seed` and are numbered on.
    """
    requests: list[Request] = []
    shared = 0
    for prompt in prompts:
        for number in range(prompt.num_samples):
            name = prompt.id if prompt.num_samples == 1 else f"{prompt.id}-{number}"
            if prompt.seed is not None:
                requests.append(Request(name, prompt.infill, prompt.seed, number))
            else:
                requests.append(Request(name, prompt.infill, seed, shared))
                shared += 1
    return requests


def generate(
    model: ScoreModel,
    requests: Sequence[Request],
    *,
    steps: int,
    sampler: str,
    batch_size: int,
    tokenizer: Tokenizer | None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Draw all requests over the data-parallel ranks; collective.

    Batches are the same whatever the number of ranks, and dealt whole, so that a sample is the same
    to the last token. Every rank returns the records of all requests, in order: id, text (None
    without a tokenizer), tokens, seed, number, entropy (nats, of the sample's tokens), length,
    steps, sampler, and seconds (of its batch).

    Args:
        on_batch: called after each batch of this rank with (batches done, batches of this rank).

    Raises:
        CheckpointError: the network's outputs are not finite.
    """
    batches = list(_equal_length_batches(requests, batch_size))
    own = range(model.layout.data_rank, len(batches), model.layout.data)
    records: dict[int, dict[str, Any]] = {}
    for done, which in enumerate(own, start=1):
        batch = [requests[index] for index in batches[which]]
        start = time.perf_counter()
        tokens_BL = sample(
            model,
            torch.from_numpy(np.stack([request.infill.tokens_L for request in batch])),
            torch.from_numpy(np.stack([request.infill.fixed_L for request in batch])),
            steps,
            sampler,
            seed=[request.seed for request in batch],
            sample_ids_B=[request.number for request in batch],
        ).numpy()
        seconds = time.perf_counter() - start
        for index, request, tokens_L in zip(batches[which], batch, tokens_BL):
            records[index] = {
                "id": request.id,
                "text": None if tokenizer is None else tokenizer.decode(tokens_L),
                "tokens": tokens_L.tolist(),
                "seed": request.seed,
                "number": request.number,
                "entropy": token_entropy(tokens_L),
                "length": len(tokens_L),
                "steps": steps,
                "sampler": sampler,
                "seconds": round(seconds, 3),
            }
        on_batch(done, len(own))
    of_ranks: list[Any] = [records]
    if model.layout.data > 1:
        of_ranks = [None] * model.layout.data
        dist.all_gather_object(of_ranks, records, group=model.layout.data_group)
    merged = {index: record for part in of_ranks for index, record in part.items()}
    return [merged[index] for index in range(len(requests))]


def token_entropy(tokens_L: npt.NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution of a sample's tokens, their order ignored.

    To be read beside any generative perplexity: a low temperature lowers both.
    """
    counts = np.unique(tokens_L, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum()) if len(counts) > 1 else 0.0


def refuse_existing_output(path: Path) -> None:
    """Raise DataError where an output would be written over, or has no directory."""
    if path.exists():
        raise DataError(f"--output {path} exists already: remove it or give another name")
    if not path.parent.is_dir():
        raise DataError(f"--output {path}: directory {path.parent} does not exist; make it first")


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one record a line, the whole file or nothing; DataError where it exists already."""
    refuse_existing_output(path)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, text.encode("utf-8", errors="replace"))


def mean_entropy(records: Sequence[dict[str, Any]]) -> float:
    """Mean token entropy of samples, nats."""
    return math.fsum(record["entropy"] for record in records) / len(records)


def _equal_length_batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Indices of requests in batches of equal length, each at most `batch_size`."""
    by_length: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
        by_length.setdefault(len(request.infill.tokens_L), []).append(index)
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
