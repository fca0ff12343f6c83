"""What one loader process delivers: batches read, corrupted and ready for the device.

On a dataset made for the purpose in a temporary directory, or on a prepared one.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from sedd_scale.benchmark.report import environment, print_report
from sedd_scale.cli import add_command, given_path
from sedd_scale.config.graph_facts import GRAPHS

# Tokens/s of ready micro-batches of 1024 from one process: so 8 GPUs use a part of a node's cores.
BAR = 20_000_000
MEMORY_BAR_MB = 300
# A sample far into a run, to start at: the position is to cost nothing.
FAR_STEP = 10**7
WORDS = ("the", "mask", "token", "noise", "score", "river", "stone", "walks", "falls", "old")


def add_arguments(subparsers: Any) -> None:
    """Register `data` and its options."""
    parser = add_command(
        subparsers,
        "data",
        help="one process that loads and corrupts batches",
        example="sedd-scale benchmark data --block-length 256 --json",
    )
    parser.add_argument("--data", type=given_path, help="a prepared dataset (one made here)")
    parser.add_argument(
        "--num-blocks", type=int, default=4096, help="of the dataset made here (default: 4096)"
    )
    parser.add_argument(
        "--block-length", type=int, default=1024, help="of its blocks, in tokens (default: 1024)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a micro-batch")
    parser.add_argument(
        "--rank-batch-size",
        type=int,
        default=64,
        help="sequences of this rank in a step (default: 64)",
    )
    parser.add_argument("--graph", choices=tuple(GRAPHS), default="absorb")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="to measure each rate for (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    if arguments.data is not None:
        result = measure(arguments, arguments.data)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(arguments, write_dataset(arguments, Path(folder)))
    print_report(result, as_json=arguments.json)


def write_dataset(arguments: argparse.Namespace, folder: Path) -> Path:
    """Random words as bytes, at least `--num-blocks` blocks of `--block-length` tokens."""
    import random

    from sedd_scale.preparation.prepare import prepare

    words = random.Random(0)
    wanted, written, documents = 1.1 * arguments.num_blocks * arguments.block_length, 0, 0
    with (folder / "text.jsonl").open("w") as lines:
        while written < wanted or documents < 100:  # enough for each split to get some
            text = " ".join(words.choices(WORDS, k=400))
            lines.write(f'{{"text": "{text}"}}\n')
            written, documents = written + len(text), documents + 1
    prepare(
        [str(folder / "text.jsonl")],
        output=folder / "prepared",
        block_length=arguments.block_length,
        tokenizer="bytes",
        valid_fraction=0.05,
    )
    return folder / "prepared"


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The report on the dataset at `path`."""
    import torch

    from sedd_scale.config import Config
    from sedd_scale.data.corpus import Corpus
    from sedd_scale.data.shards import Dataset
    from sedd_scale.parallel.layout import initialize_layout, shutdown
    from sedd_scale.training.batches import TrainBatches

    torch.set_num_threads(1)  # one loader process, beside a training that has the others
    layout = initialize_layout()
    resident = resident_megabytes()
    start = time.perf_counter()
    dataset = Dataset(path)
    config = Config().override(
        f"graph.name={arguments.graph}",
        f"data.path={path}",
        f"model.vocab_size={dataset.vocab_size}",
        f"training.global_batch={arguments.rank_batch_size}",
        f"training.micro_batch={arguments.batch_size}",
    )
    corpus = Corpus(config.data)
    batches = TrainBatches(corpus, config, layout)
    batches.of_step(FAR_STEP)
    first_batch = time.perf_counter() - start

    tokens = arguments.rank_batch_size * dataset.block_length
    positions = range(arguments.rank_batch_size)
    rates = [
        tokens * steps_per_second(make, arguments.seconds)
        for make in (
            lambda step: batches.loader.batch(step, positions),
            batches.of_step,
        )
    ]
    result = {
        "part": "data",
        "dataset": "made here" if arguments.data is None else str(arguments.data),
        "blocks": dataset.splits["train"]["blocks"],
        "length": dataset.block_length,
        "batch": arguments.batch_size,
        "step": arguments.rank_batch_size,
        "graph": arguments.graph,
        "seconds_to_first_batch": first_batch,
        "seconds": tokens / rates[1],
        "tokens_per_second": rates[1],
        "read_tokens_per_second": rates[0],
        "bar_tokens_per_second": BAR,
        "resident_mb": resident_megabytes(),
        "extra_mb": resident_megabytes() - resident,
        "bar_extra_mb": MEMORY_BAR_MB,
        **environment(),
    }
    shutdown()
    return result


def steps_per_second(make: Any, seconds: float) -> float:
    """How many steps `make` makes in a second, over `seconds` of consecutive ones."""
    start, step = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step += 1
        make(step)
    return step / (time.perf_counter() - start)


def resident_megabytes() -> float:
    """Memory that this process holds now."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6
