"""Bound the perplexity of a trained model on text."""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_scale.cli import make_parser, run_command
from sedd_scale.errors import ConfigError
from sedd_scale.evaluation import DATASETS, PROTOCOLS
from sedd_scale.interop.model_arguments import add_model_arguments, open_model

if TYPE_CHECKING:
    from sedd_scale.evaluation.corpora import Corpus
    from sedd_scale.evaluation.result import BoundResult


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "Bound the perplexity of a trained model on text: a table, then one line of JSON.",
        "torchrun --nproc-per-node 2 tools/eval_ppl.py --checkpoint runs/books --data data/books",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        metavar="PATH",
        help="a dataset of tools/prepare_data.py (a directory, a URL, or pipe: and a command), or "
        "a file: .jsonl (one document a line) or any text (one document), plain or with .gz or .xz",
    )
    source.add_argument(
        "--dataset",
        choices=DATASETS,
        metavar="NAME",
        help=f"{', '.join(DATASETS)}: not fetched by this version, which answers with the file to "
        "give to --data",
    )
    add("--split", default="valid", help="of a prepared dataset (%(default)s)")
    add(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where files of a remote dataset are kept (in the temporary directory)",
    )
    add("--field", default="text", help="of a .jsonl line, the text (%(default)s)")
    add("--block-length", type=int, metavar="L", help="for a file (the checkpoint's)")
    add(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="low-variance: stratified times, a true bound with all its terms; paper: independent "
        "times, the diffusion term alone; any-order: random orders, for models without time "
        "conditioning (%(default)s)",
    )
    add(
        "--draws",
        type=int,
        metavar="K",
        help="times drawn a block (16; paper 1000), or orders (any-order 8); none for an "
        "autoregressive model, whose likelihood is exact",
    )
    add(
        "--max-blocks",
        type=int,
        metavar="K",
        help="at most so many blocks, evenly spread (all; paper 1024; any-order 64)",
    )
    add("--seed", type=int, default=0, metavar="I", help="of all draws (%(default)s)")
    add("--batch-size", type=int, default=16, metavar="B", help="sequences at a time (%(default)s)")
    add("--json", action="store_true", help="print the line of JSON only")
    return parser


def report_of(
    arguments: argparse.Namespace, result: "BoundResult", corpus: "Corpus", objective: str
) -> dict[str, Any]:
    """The JSON object of an evaluation."""
    others = {"normalised": result.normalised, "likelihood": result.likelihood}
    return {
        "objective": objective,
        "kind": result.kind,
        "nats_per_token": result.nats_per_token,
        "bits_per_token": result.bits_per_token,
        "bits_per_char": result.bits_per_token / corpus.characters_per_token,
        "bits_per_byte": result.bits_per_token / corpus.bytes_per_token,
        "perplexity": result.perplexity,
        "stderr": result.stderr,
        "stderr_text": result.stderr_text,
        "ci95": list(result.ci95),
        "terms": result.terms,
        **{
            f"{name}_{key}": value
            for name, other in others.items()
            if other is not None
            for key, value in asdict(other).items()
        },
        "draws": result.draws,
        "replicates": result.replicates,
        "blocks": result.blocks,
        "source_blocks": corpus.source_blocks,
        "block_length": corpus.block_length,
        "tokens": result.tokens,
        "dropped_tokens": corpus.dropped_tokens,
        "network_calls": result.network_calls,
        "protocol": result.protocol,
        "t_min": result.t_min,
        "seed": arguments.seed,
        "data": corpus.name,
        "data_fingerprint": corpus.fingerprint,
        "checkpoint": str(arguments.checkpoint),
        "weights": arguments.weights,
        "seconds": round(result.seconds, 3),
    }


def format_table(report: dict[str, Any]) -> str:
    """The report for people."""

    def number(value: float | None) -> str:
        return "left out" if value is None else f"{value:.4f}"

    text = report["stderr_text"]
    rows = [
        ("checkpoint", f"{report['checkpoint']} ({report['weights']})"),
        ("objective", report["objective"]),
        ("data", report["data"]),
        (
            "blocks",
            f"{report['blocks']:,} of {report['source_blocks']:,}, {report['block_length']} tokens "
            f"each; {report['dropped_tokens']:,} tokens at the end dropped",
        ),
        *_nats_rows(report),
        ("  over blocks", "one block only" if text is None else f"± {text:.4f} (other text)"),
    ]
    if report["kind"] == "bound":
        terms = report["terms"]
        rows += [(f"  {name}", number(terms[name])) for name in terms]
    for name, meaning in (
        ("normalised", "the bound with normalised scores"),
        ("likelihood", "an estimate from above of the likelihood itself"),
    ):
        if f"{name}_nats_per_token" in report:
            value, error = report[f"{name}_nats_per_token"], report[f"{name}_stderr"]
            rows.append((f"  {name}", f"{value:.4f} ± {error:.4f} ({meaning})"))
    rows += [
        ("bits/token", f"{report['bits_per_token']:.4f}"),
        ("bits/char", f"{report['bits_per_char']:.4f}"),
        ("bits/byte", f"{report['bits_per_byte']:.4f}"),
        ("perplexity", f"{report['perplexity']:.3f}"),
        ("seconds", f"{report['seconds']:.1f}"),
    ]
    return "\n".join(f"{name:18}{value}" for name, value in rows)


def _nats_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """How the number came about, and the number."""
    nats = f"{report['nats_per_token']:.4f}"
    if report["kind"] == "exact":
        return [("protocol", "exact likelihood by the chain rule"), ("nats/token", nats)]
    low, high = report["ci95"]
    what = "orders" if report["kind"] == "any-order" else "draws"
    return [
        ("protocol", f"{report['protocol']}, {report['draws']} {what} a block"),
        ("nats/token", f"{nats} ± {report['stderr']:.4f}"),
        ("  95% interval", f"{low:.4f} .. {high:.4f} (over draws)"),
    ]


def eval_command(arguments: argparse.Namespace) -> None:
    """Evaluate; the first process prints."""
    if arguments.block_length is not None and arguments.block_length < 1:
        raise ConfigError(f"--block-length {arguments.block_length}: give at least 1")
    from sedd_scale.evaluation.corpora import open_corpus, refuse_dataset_by_name

    if arguments.dataset is not None:
        raise refuse_dataset_by_name(arguments.dataset)
    from sedd_scale.evaluation.bound import evaluate_bound
    from sedd_scale.evaluation.plan import DEFAULT_MAX_BLOCKS
    from sedd_scale.parallel.layout import shutdown

    model = open_model(arguments)
    is_first = model.layout.rank == 0
    corpus = open_corpus(
        arguments.data,
        tokenizer=model.tokenizer,
        num_tokens=model.graph.num_tokens,
        block_length=arguments.block_length or model.block_length,
        split=arguments.split,
        field=arguments.field,
        cache_dir=arguments.cache_dir,
        max_blocks=arguments.max_blocks or DEFAULT_MAX_BLOCKS[arguments.protocol],
    )
    trained = model.block_length
    if is_first and trained is not None and corpus.block_length != trained:
        print(
            f"note: blocks of {corpus.block_length} tokens, the model was trained on {trained}",
            file=sys.stderr,
        )

    def show(done: int, total: int) -> None:
        if is_first and sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rgroup {done} of {total}", end=end, file=sys.stderr, flush=True)

    result = evaluate_bound(
        model,
        corpus.blocks_nL,
        draws=arguments.draws,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        protocol=arguments.protocol,
        block_ids_n=corpus.block_ids_n,
        text_n=corpus.text_n,
        on_progress=show,
    )
    if is_first:
        report = report_of(arguments, result, corpus, model.objective.name)
        if not arguments.json:
            print(format_table(report))
        finite = report if math.isfinite(report["perplexity"]) else {**report, "perplexity": None}
        print(json.dumps(finite))
    shutdown()


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), eval_command))
