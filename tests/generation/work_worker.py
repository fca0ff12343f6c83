"""Samples and a bound of tiny models, made on however many processes there are.

Run by `test_processes`, whose own process makes the same: `work_worker.py FOLDER`. Prints one line
of JSON on rank 0.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.generation.batch import Request, cut_batches, equal_requests
from sedd_scale.generation.generate import generate, run_identity
from sedd_scale.generation.output_shards import ShardDirectory
from sedd_scale.parallel.layout import shutdown
from sedd_scale.sampling import samplers_of
from sedd_scale.sampling.infill import infill_from_tokens, unconditional
from sedd_scale.sampling.settings import SamplerSettings
from tests.evaluation.enumeration import all_states, tiny_model

BATCH_SIZE = 2


def requests_of(graph: str) -> list[Request]:
    """Samples of two lengths, and of every sampler the graph has."""
    settings = SamplerSettings(steps=4)
    requests = equal_requests(5, unconditional(6), 1, settings)
    requests += equal_requests(4, infill_from_tokens([2], [1], 3, 4), 2, settings)
    others = [SamplerSettings(sampler="euler", steps=4, time_grid="cosine")]
    if graph == "absorb":
        others += [SamplerSettings(sampler, steps=4) for sampler in samplers_of(graph)]
        others += [
            SamplerSettings("ancestral", steps=4, remask=2.0),
            SamplerSettings("margin", temperature=0.7, top_p=0.9),
        ]
    for own in others:
        requests += equal_requests(3, unconditional(5), 3, own)
    return requests


def make(tensor: int, folder: Path) -> dict[str, Any]:
    """Bounds and samples of both graphs."""
    made: dict[str, Any] = {}
    for graph in ("absorb", "uniform"):
        model = tiny_model(graph, "loglinear", tensor=tensor)
        bound = evaluate_bound(model, all_states(3, 2), draws=6, replicates=3, batch_size=16)
        requests = requests_of(graph)
        output = folder / f"{graph}-{tensor}.jsonl"
        done = generate(model, requests, output, batch_size=BATCH_SIZE, tokenizer=None)
        resumed = folder / f"{graph}-{tensor}-resumed.jsonl"
        if model.layout.rank == 0:
            begin(requests, output, resumed)
        again = generate(model, requests, resumed, batch_size=BATCH_SIZE, tokenizer=None)
        made[graph] = {
            "data_parallel": model.layout.data,
            "bound": [bound.nats_per_token, bound.stderr, bound.network_calls],
            "blocks": bound.block_nats_n.tolist(),
            "tokens": tokens_in(output),
            "resumed": tokens_in(resumed),
            "before": [done.samples_before, again.samples_before],
        }
    made["rank"] = model.layout.rank
    return made


def tokens_in(path: Path) -> list[list[int]]:
    """The tokens of every sample of an output."""
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()]


def begin(requests: list[Request], finished: Path, output: Path) -> None:
    """Leave what a run of one process leaves that is killed while it writes its third batch."""
    records = [json.loads(line) for line in finished.read_text().splitlines()]
    batches = cut_batches(requests, BATCH_SIZE)
    shards = ShardDirectory(output, batches)
    shards.open(run_identity(requests, batch_size=BATCH_SIZE), "killed")
    writer = shards.writer(0)
    for indices in batches[:3]:
        writer.append(indices, [records[index] for index in indices])
    writer.close()
    writer.path.write_bytes(writer.path.read_bytes()[:-9])
    shards.close()


if __name__ == "__main__":
    by_layout = {}
    for tensor in (1, 2):
        by_layout[tensor] = make(tensor, Path(sys.argv[1]))
        parallel_state.destroy_model_parallel()
    shutdown()
    if by_layout[1]["rank"] == 0:
        print(json.dumps(by_layout))
