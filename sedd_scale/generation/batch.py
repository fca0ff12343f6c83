"""What is to be drawn, cut into batches the same way whatever the number of ranks, and drawn."""

import hashlib
import json
import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sedd_scale.arrays import IntArray
from sedd_scale.generation.prompts_file import Prompt, sample_names
from sedd_scale.generation.quality import token_entropy
from sedd_scale.generation.trace import TraceRecorder
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling.batch_state import StepObserver
from sedd_scale.sampling.infill import Given
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.tokenizers.base import Tokenizer


class Request(NamedTuple):
    """One sample to draw.

    Attributes:
        id: what the output calls it.
        given: what is given of it.
        seed: of its draws.
        number: which draw of that seed it is.
        settings: how it is drawn.
        place: among all requests, where it is one of a part of them.
    """

    id: str | int
    given: Given
    seed: int
    number: int
    settings: SamplerSettings = SamplerSettings()
    place: int | None = None


def equal_requests(
    count: int, given: Given, seed: int, settings: SamplerSettings | None = None
) -> list[Request]:
    """`count` samples around the same, ids 0..count-1."""
    chosen = settings or SamplerSettings()
    return [Request(number, given, seed, number, chosen) for number in range(count)]


def prompt_requests(prompts: Sequence[Prompt], seed: int) -> list[Request]:
    """All samples of all prompts, in order.

    A prompt with a seed of its own numbers its samples from 0, so that they do not depend on its
    place in the file; the others share `seed` and are numbered on.
    """
    requests: list[Request] = []
    shared = 0
    for prompt in prompts:
        for number, name in enumerate(sample_names(prompt.id, prompt.num_samples)):
            own = prompt.seed is not None
            requests.append(
                Request(
                    name,
                    prompt.given,
                    seed if prompt.seed is None else prompt.seed,
                    number if own else shared,
                    prompt.settings,
                )
            )
            shared += not own
    return requests


def cut_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Indices of requests in batches of equal settings, each at most `batch_size`.

    Within equal settings the short ones come first, so that few positions of a batch only fill it
    up.
    """
    alike: dict[SamplerSettings, list[int]] = {}
    for index, request in enumerate(requests):
        alike.setdefault(request.settings, []).append(index)
    batches = []
    for indices in alike.values():
        indices.sort(key=lambda index: len(requests[index].given.tokens_L))
        batches += [indices[k : k + batch_size] for k in range(0, len(indices), batch_size)]
    return batches


def requests_of_shard(
    requests: Sequence[Request], batch_size: int, shard: int, num_shards: int
) -> list[Request]:
    """Every `num_shards`-th batch, from number `shard` on, for jobs that share the work in advance.

    The batches are those of the whole, so that a sample is the same in a shard. A shard behind the
    last batch has no request.
    """
    batches = cut_batches(requests, batch_size)
    chosen = sorted(index for batch in batches[shard::num_shards] for index in batch)
    return [requests[index]._replace(place=index) for index in chosen]


def batch_cost(batch: Sequence[Request]) -> int:
    """Tokens that go through the network for a batch, at most: what its time grows with."""
    longest = max(len(request.given.tokens_L) for request in batch)
    free = max(request.given.num_free for request in batch)
    return len(batch) * longest * max(1, batch[0].settings.resolved_steps or free)


def requests_digest(requests: Sequence[Request]) -> str:
    """SHA-256 (hex) of everything the samples depend on but the model."""
    digest = hashlib.sha256()
    givens: dict[int, str] = {}  # shared by many requests; kept alive by them
    for request in requests:
        key = id(request.given)
        if key not in givens:
            givens[key] = request.given.digest()
        line = [request.id, givens[key], request.seed, request.number, request.settings.to_dict()]
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def draw_tokens(
    model: ScoreModel, batch: Sequence[Request], *, on_step: StepObserver | None = None
) -> list[IntArray]:
    """The tokens of requests of equal settings; tensor-parallel ranks call it together.

    Args:
        on_step: as of `draw`.

    Raises:
        CheckpointError: the network's outputs are not finite.
    """
    lengths_B = [len(request.given.tokens_L) for request in batch]
    given_BL = np.zeros((len(batch), max(lengths_B)), dtype=np.int64)
    fixed_BL = np.zeros(given_BL.shape, dtype=np.bool_)
    for row, request in enumerate(batch):
        given_BL[row, : lengths_B[row]], fixed_BL[row, : lengths_B[row]] = request.given
    drawn_BL = draw(
        model,
        torch.from_numpy(given_BL),
        torch.from_numpy(fixed_BL),
        batch[0].settings,
        seed=[request.seed for request in batch],
        sample_ids_B=[request.number for request in batch],
        lengths_B=None if min(lengths_B) == max(lengths_B) else lengths_B,
        on_step=on_step,
    ).numpy()
    return [row_L[:length] for row_L, length in zip(drawn_BL, lengths_B, strict=True)]


def draw_batch(
    model: ScoreModel,
    batch: Sequence[Request],
    *,
    tokenizer: Tokenizer | None,
    traced: Collection[int] = (),
) -> list[dict[str, Any]]:
    """Draw requests of equal settings; tensor-parallel ranks call it together.

    Returns a record each: id, text (None without a tokenizer), tokens, given (ranges of fixed
    positions, [start, end) each), seed, number, settings, entropy (nats, of the sample's tokens),
    length, seconds (of the batch), place (where the request has one), and trace for the rows of
    the batch in `traced`.

    Raises:
        CheckpointError: the network's outputs are not finite.
    """
    start = time.perf_counter()
    givens = {row: batch[row].given for row in traced}
    recorder = TraceRecorder(givens, mask_id=model.graph.mask_id)
    drawn = draw_tokens(model, batch, on_step=recorder.on_step if traced else None)
    seconds = time.perf_counter() - start
    traces = recorder.traces(tokenizer)
    records = []
    for row, (request, tokens_L) in enumerate(zip(batch, drawn, strict=True)):
        record = {
            "id": request.id,
            "text": None if tokenizer is None else tokenizer.decode(tokens_L),
            "tokens": tokens_L.tolist(),
            **request.given.describe(),
            "seed": request.seed,
            "number": request.number,
            "settings": {
                **request.settings.to_dict(),
                "steps": request.settings.resolved_steps,
            },
            "entropy": token_entropy(tokens_L),
            "length": len(tokens_L),
            "seconds": round(seconds, 3),
        }
        if request.place is not None:
            record["place"] = request.place
        if row in traces:
            record["trace"] = traces[row]
        records.append(record)
    return records
