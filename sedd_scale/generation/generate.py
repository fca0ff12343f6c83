"""Many samples over many processes into one file, in order, interrupted or not.

A sample depends on its request alone: batches are cut the same way on any number of ranks and every
draw is keyed, so which rank takes which batch changes nothing but its time.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sedd_scale.errors import ConfigError
from sedd_scale.files.atomic import refuse_existing_output
from sedd_scale.generation.batch import (
    Request,
    batch_cost,
    cut_batches,
    draw_batch,
    requests_digest,
)
from sedd_scale.generation.output_shards import (
    Record,
    ShardDirectory,
)
from sedd_scale.generation.progress import Done, ProgressLine
from sedd_scale.generation.quality import QualityReport
from sedd_scale.generation.work_queue import WorkQueue
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.agreement import from_first, gathered
from sedd_scale.parallel.layout import Layout
from sedd_scale.tokenizers.base import Tokenizer

FORMAT_VERSION = 1


class Generated(NamedTuple):
    """What a run made; equal on all processes but for `quality`, which the first one has.

    Attributes:
        samples: in the output.
        samples_before: of them, those an earlier run had finished.
        tokens: drawn by this run, given ones not counted.
        seconds: of this run's draws.
        quality: the report over all samples, or None elsewhere than on the first process.
    """

    samples: int
    samples_before: int
    tokens: int
    seconds: float
    quality: dict[str, Any] | None


def generate(
    model: ScoreModel,
    requests: Sequence[Request],
    output: Path,
    *,
    batch_size: int,
    tokenizer: Tokenizer | None,
    run: Mapping[str, Any] | None = None,
    num_traced: int = 0,
    progress: TextIO | None = None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Generated:
    """Draw all requests over the data-parallel ranks into `output`; collective.

    Killed and called again, with the same arguments and on any number of processes, it resumes
    from the batches that are finished (`output`.parts).

    Args:
        output: one JSON record per line (see `draw_batch`), in the order of the requests.
        batch_size: most samples at a time on a rank.
        tokenizer: gives the records their text.
        run: what else the samples depend on, by the option's name: a run resumes only if it is
            the same. The model is not looked at.
        num_traced: this many samples, the first ones, keep their trajectory.
        progress: where the first process shows how far all are.
        on_record: called on the first process with each record in order, at the end.

    Raises:
        DataError: the output exists or cannot be written, or another run's parts are in its place.
        ConfigError: the processes do not share the output's filesystem.
        CheckpointError: the network's outputs are not finite; finished batches are kept.
        TrainingError: the first process is gone.
    """
    layout = model.layout
    refuse_existing_output(output)
    batches = cut_batches(requests, batch_size)
    shards = ShardDirectory(output, batches)
    asked = run_identity(requests, batch_size=batch_size, num_traced=num_traced, run=run)
    pending, number = _open(shards, asked, layout)
    costs = {batch: batch_cost([requests[index] for index in batches[batch]]) for batch in pending}
    # The longest first: the last ones to end are short, so that ranks end together.
    order = sorted(pending, key=lambda batch: (-costs[batch], batch))
    queue = WorkQueue(layout, order, Done._fields)
    before = len(requests) - sum(len(batches[batch]) for batch in pending)
    start = time.perf_counter()
    if layout.rank == 0 and progress is not None and order:
        with ProgressLine(
            lambda: Done(*queue.totals()),
            total_samples=len(requests),
            samples_before=before,
            total_work=sum(costs.values()),
            stream=progress,
        ):
            _draw(model, requests, shards, queue, number, costs, tokenizer, num_traced)
    else:
        _draw(model, requests, shards, queue, number, costs, tokenizer, num_traced)
    seconds = time.perf_counter() - start
    tokens = Done(*queue.totals()).tokens
    quality = QualityReport()

    def merge() -> None:
        def note(record: Record) -> None:
            quality.add(record["tokens"])
            on_record(record)

        shards.merge(note)
        shards.remove()

    if layout.rank == 0:
        merge()
    queue.wait_at("merged")
    report = quality.result() if layout.rank == 0 else None
    return Generated(len(requests), before, tokens, seconds, report)


def run_identity(
    requests: Sequence[Request],
    *,
    batch_size: int,
    num_traced: int = 0,
    run: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What has to be the same for a run to resume, by option; arguments as of `generate`."""
    return {
        **(run or {}),
        "--batch-size": batch_size,
        "--trace-samples": num_traced,
        "--prompts (digest)": requests_digest(requests),
        "format": FORMAT_VERSION,
    }


def _open(shards: ShardDirectory, run: Mapping[str, Any], layout: Layout) -> tuple[list[int], int]:
    """Batches that are still to be drawn, and the number of this process's file."""
    nonce = os.urandom(8).hex()

    def recover() -> tuple[str, list[int], int]:
        shards.open(run, nonce)
        return nonce, shards.recover(), shards.next_number()

    of_first, finished, number = from_first(recover)
    sees = gathered(shards.sees(of_first))
    if not all(sees):
        raise ConfigError(
            f"process {sees.index(False)} does not see {shards.path}, which the first one made: "
            "put --output on a filesystem that all nodes share"
        )
    done = set(finished)
    pending = [batch for batch in range(len(shards.batches)) if batch not in done]
    return pending, number + layout.data_rank


def _draw(
    model: ScoreModel,
    requests: Sequence[Request],
    shards: ShardDirectory,
    queue: WorkQueue,
    number: int,
    costs: Mapping[int, int],
    tokenizer: Tokenizer | None,
    num_traced: int,
) -> None:
    """Take batches until all are dealt, then wait until all are finished."""
    writes = model.layout.tensor_rank == 0
    writer = shards.writer(number) if writes and costs else None
    try:
        while (claimed := queue.claim()) is not None:
            indices = shards.batches[claimed]
            batch = [requests[index] for index in indices]
            traced = [row for row, index in enumerate(indices) if index < num_traced]
            records = draw_batch(model, batch, tokenizer=tokenizer, traced=traced)
            if writer is not None:
                writer.append(indices, records)
            drawn = sum(request.given.num_free for request in batch)
            queue.finish(len(batch), drawn, costs[claimed])
        queue.wait_for_all()
    finally:
        if writer is not None:
            writer.close()
