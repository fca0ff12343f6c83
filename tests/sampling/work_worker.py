"""Samples and a bound of tiny models, made on however many processes there are.

Run by `test_processes`, whose own process makes the same. Prints one line of JSON on rank 0.
"""

import json
from typing import Any

from megatron.core import parallel_state

from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.parallel.layout import shutdown
from sedd_scale.sampling.batch import generate, unconditional_requests
from sedd_scale.sampling.infill import Infill, infill_from_tokens, unconditional
from tests.evaluation.enumeration import all_states, tiny_model


def make(tensor: int) -> dict[str, Any]:
    """Bounds and samples of both graphs."""
    made: dict[str, Any] = {}
    for graph in ("absorb", "uniform"):
        model = tiny_model(graph, "loglinear", tensor=tensor)
        bound = evaluate_bound(model, all_states(3, 2), draws=6, replicates=3, batch_size=16)
        half: Infill = infill_from_tokens([2], [1], 3, 4)
        requests = unconditional_requests(5, unconditional(6), 1)
        requests += unconditional_requests(4, half, 2)
        records = generate(
            model, requests, steps=4, sampler="analytic", batch_size=2, tokenizer=None
        )
        made[graph] = {
            "data_parallel": model.layout.data,
            "bound": [bound.nats_per_token, bound.stderr, bound.network_calls],
            "blocks": bound.block_nats_n.tolist(),
            "tokens": [record["tokens"] for record in records],
        }
    made["rank"] = model.layout.rank
    return made


if __name__ == "__main__":
    by_layout = {}
    for tensor in (1, 2):
        by_layout[tensor] = make(tensor)
        parallel_state.destroy_model_parallel()
    shutdown()
    if by_layout[1]["rank"] == 0:
        print(json.dumps(by_layout))
