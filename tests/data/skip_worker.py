"""One of several ranks that meet a damaged shard; prints what it trained on.

python -m tests.data.skip_worker DATASET FIRST_STEP END_STEP BREAK_AT POLICY RESUMED_SKIPS
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.data.prefetcher import Prefetcher
from sedd_scale.engine.engine import MicroBatch
from sedd_scale.parallel.layout import initialize_layout, shutdown
from sedd_scale.training.batches import TrainBatches, ValidationBatches


def damage(dataset: Path, shard: int, *, split: str = "train") -> None:
    """Change one byte of every block of a shard."""
    path = dataset / f"{split}-{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    for position in range(700, len(content) - 10_240, 1024):
        content[position] ^= 1
    path.write_bytes(content)


def main() -> None:
    dataset, policy, skips = Path(sys.argv[1]), sys.argv[5], json.loads(sys.argv[6])
    first, end, break_at = map(int, sys.argv[2:5])
    layout = initialize_layout()
    config = Config().override(
        f"data.path={dataset}",
        f"data.on_bad_shard={policy}",
        "training.global_batch=8",
        "training.micro_batch=2",
        "training.valid_blocks=40",
        "model.vocab_size=257",
    )
    corpus = Corpus(config.data)
    batches = TrainBatches(corpus, config, layout, skipped=skips)
    validation = ValidationBatches(corpus, config, layout)
    digests = []

    def produce(step: int) -> list[MicroBatch]:
        # Only rank 0 breaks it, and the ranks read different blocks at different times.
        if step == break_at and layout.rank == 0:
            damage(dataset, 1)
        return batches.of_step(step).micro_batches

    with Prefetcher(produce, first, end_step=end) as steps:
        for micro_batches in steps:
            noisy = [batch.inputs[0].numpy().tobytes() for batch in micro_batches]
            digests.append([hashlib.sha256(content).hexdigest()[:16] for content in noisy])
    places = batches.loader.places(np.arange(8 * end))[1]
    result = {
        "rank": layout.rank,
        "digests": digests,
        "skipped": sorted(batches.loader.skipped),
        "order": hashlib.sha256(places.tobytes()).hexdigest(),
        "metrics": batches.metrics(8 * end),
        "valid_blocks": validation.blocks.tolist(),
        "valid_metrics": validation.metrics(),
        "last": batches.corpus.describe_position(batches.loader, 8 * end)["skipped_shards"],
    }
    Path(sys.argv[1]).with_name(f"rank-{layout.rank}.json").write_text(json.dumps(result))
    shutdown()


if __name__ == "__main__":
    main()
