"""How many network calls the two protocols of the bound need for the same standard error.

A variance falls as one over the calls, so the calls of the paper's protocol over those of the
low-variance one, for the same error on the same blocks of a trained model, are

    calls_ratio = (calls x variance of the paper's) / (calls x variance of low-variance)

whatever the number of draws of the former. That of the latter matters: strata are as many as the
draws of a replicate, here those of the default. Variances are averaged over several seeds.
"""

import argparse
import functools
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_scale.benchmark.arguments import add_measured_arguments
from sedd_scale.benchmark.report import environment, run_measured
from sedd_scale.cli import add_command, given_path

if TYPE_CHECKING:
    from sedd_scale.model.score_model import ScoreModel

SMALL = (
    "model.hidden_size=128",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.cond_dim=64",
    "model.dropout=0",
    "optimizer.lr=0.003",
    "optimizer.warmup_steps=30",
    "optimizer.ema_decay=0.99",
    "training.global_batch=4",
    "training.micro_batch=4",
    "training.precision=fp32",
    "training.valid_every=0",
    "checkpoint.every=1000000",
)


def add_arguments(subparsers: Any) -> None:
    """Register `eval` and its options."""
    parser = add_command(
        subparsers,
        "eval",
        help="network calls of the bound's protocols for the same standard error",
        example="sedd-scale benchmark eval --json",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=given_path,
        metavar="PATH",
        help="a trained model (without: a small one is trained here, on --data or text of Python)",
    )
    add(
        "--data",
        type=given_path,
        metavar="PATH",
        help="a prepared dataset, whose validation blocks are measured; needed with --checkpoint",
    )
    add("--block-length", type=int, default=1024, metavar="L", help="of the text (%(default)s)")
    add("--blocks", type=int, default=32, metavar="K", help="measured (%(default)s)")
    add("--paper-draws", type=int, default=16, metavar="K", help="times a block (%(default)s)")
    add("--draws", type=int, default=16, metavar="K", help="of low-variance (%(default)s)")
    add("--num-seeds", type=int, default=3, metavar="K", help="of the draws (%(default)s)")
    add("--batch-size", type=int, default=16, metavar="B", help="sequences at a time (16)")
    add("--train-steps", type=int, default=300, metavar="K", help="of a small model (%(default)s)")
    add_measured_arguments(parser, repeats=None)
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the small model")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Calls, errors and their ratio, for one trained model and one set of blocks.

    Raises:
        ConfigError: a checkpoint without data, or draws that leave no error to be told.
        DataError, CheckpointError: as `open_corpus` and `load_pretrained` have them.
    """

    from sedd_scale.data.shards import Dataset
    from sedd_scale.errors import ConfigError
    from sedd_scale.evaluation.bound import evaluate_bound
    from sedd_scale.evaluation.corpora import open_corpus
    from sedd_scale.interop.pretrained import load_pretrained

    for name in ("blocks", "num_seeds", "train_steps", "threads"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} has to be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        data, checkpoint = arguments.data, arguments.checkpoint
        if checkpoint is not None and data is None:
            raise ConfigError("--checkpoint needs --data: give the dataset to measure it on")
        if data is None:
            data = _python_text(Path(folder) / "data", arguments.block_length)
        length = Dataset(data).block_length
        if length != arguments.block_length:
            raise ConfigError(
                f"--data {data} has blocks of {length} tokens: give --block-length {length}"
            )
        if checkpoint is None:
            checkpoint = _train(Path(folder) / "run", data, arguments)
        model: ScoreModel = load_pretrained(checkpoint)
        corpus = open_corpus(
            data,
            tokenizer=model.tokenizer,
            num_tokens=model.graph.num_tokens,
            block_length=arguments.block_length,
            max_blocks=arguments.blocks,
        )
        found: dict[str, Any] = {}
        for protocol, draws in (
            ("paper", arguments.paper_draws),
            ("low-variance", arguments.draws),
        ):
            results = [
                evaluate_bound(
                    model,
                    corpus.blocks_nL,
                    protocol=protocol,
                    draws=draws,
                    seed=seed,
                    batch_size=arguments.batch_size,
                    block_ids_n=corpus.block_ids_n,
                    text_n=corpus.text_n,
                )
                for seed in range(arguments.num_seeds)
            ]
            variances = [result.stderr**2 for result in results]
            name = protocol.replace("-", "_")
            calls = sum(result.network_calls for result in results) / len(results)
            found |= {
                f"{name}_draws": draws,
                f"{name}_calls": calls,
                f"{name}_stderr": math.sqrt(sum(variances) / len(variances)),
                f"{name}_nats_per_token": sum(r.nats_per_token for r in results) / len(results),
                f"{name}_calls_x_variance": calls * sum(variances) / len(variances),
                f"{name}_seconds": sum(result.seconds for result in results),
            }
    cost = found.pop("paper_calls_x_variance"), found.pop("low_variance_calls_x_variance")
    return {
        "part": "eval",
        "graph": model.config.graph.name,
        "schedule": model.config.noise.name,
        "hidden_size": model.config.model.hidden_size,
        "num_layers": model.config.model.num_layers,
        "vocab_size": model.graph.num_tokens,
        "block_length": corpus.block_length,
        "blocks": len(corpus.blocks_nL),
        "seeds": arguments.num_seeds,
        **found,
        # For the error of one, the other needs as many calls as the ratio of calls x variance.
        "paper_calls_for_that_stderr": cost[0] / found["low_variance_stderr"] ** 2,
        "calls_ratio": cost[0] / cost[1],
        **environment(),
    }


def _python_text(folder: Path, block_length: int) -> Path:
    """A dataset of this Python's own text, as bytes."""
    from sedd_scale.preparation.prepare import prepare

    prepare(
        ["builtin:python"],
        output=folder,
        block_length=block_length,
        tokenizer="bytes",
        valid_fraction=0.1,
    )
    return folder


def _train(run_directory: Path, data: Path, arguments: argparse.Namespace) -> Path:
    """A small model, trained here."""
    from sedd_scale.config import Config
    from sedd_scale.parallel.layout import leave_layout
    from sedd_scale.training.loop import train

    config = Config().override(
        *SMALL, f"data.path={data}", f"training.steps={arguments.train_steps}", *arguments.overrides
    )
    train(config, run_directory)
    leave_layout()
    return run_directory
