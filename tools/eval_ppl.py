"""Bound the perplexity of a trained model on text."""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sedd_scale.cli import given_path, make_parser, run_command
from sedd_scale.errors import ConfigError
from sedd_scale.evaluation import DATASETS, DOCUMENTS, PROTOCOLS, REMAINDERS
from sedd_scale.evaluation.detokenizers import DETOKENIZERS
from sedd_scale.interop.model_arguments import add_model_arguments, open_model
from sedd_scale.tracking.console import format_duration

if TYPE_CHECKING:
    from sedd_scale.evaluation.corpora import Corpus
    from sedd_scale.evaluation.finished_groups import FinishedGroups
    from sedd_scale.evaluation.result import BoundResult
    from sedd_scale.evaluation.text_blocks import TextSettings
    from sedd_scale.model.score_model import ScoreModel


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
        "a file: .jsonl (one document a line) or any text (one document), plain or with .gz or "
        ".xz, or .parquet",
    )
    source.add_argument(
        "--dataset",
        choices=DATASETS,
        metavar="NAME",
        help=f"the test text of a benchmark, from the Hugging Face hub: {', '.join(DATASETS)}",
    )
    add("--split", help="of a prepared dataset (valid)")
    add(
        "--cache-dir",
        type=given_path,
        metavar="DIR",
        help="where files of a remote dataset are kept (in the temporary directory; of the hub: "
        "where its client keeps them)",
    )
    add("--field", help="of a .jsonl line or column of a .parquet, the text (text)")
    add(
        "--detokenizer",
        choices=DETOKENIZERS,
        help="of a file, rules that take a benchmark's tokenisation out, row by row (none; those "
        "of a --dataset)",
    )
    add(
        "--documents",
        choices=DOCUMENTS,
        help="joined: all rows are one document; rows: each is one, blank ones left out; all-rows: "
        "blank ones too, as SEDD's code packed its benchmarks (rows of a table, others joined)",
    )
    add(
        "--no-wrap",
        action="store_true",
        help="each document begins a block of its own (without: one stream, cut into blocks)",
    )
    add(
        "--remainder",
        choices=REMAINDERS,
        help="of tokens that fill no block (drop; with --no-wrap pad); both are reported",
    )
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
    add(
        "--resume",
        type=given_path,
        metavar="DIR",
        help="keep finished blocks there; killed and started again, the same command goes on, with "
        "any number of processes",
    )
    add("--json", action="store_true", help="print the line of JSON only")
    return parser


def report_of(
    arguments: argparse.Namespace,
    result: "BoundResult",
    corpus: "Corpus",
    objective: str,
    fingerprint: str,
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
        "wrap": corpus.wrap,
        "remainder": corpus.remainder,
        "documents": corpus.documents,
        "detokenizer": corpus.detokenizer,
        "network_calls": result.network_calls,
        "protocol": result.protocol,
        "t_min": result.t_min,
        "seed": arguments.seed,
        "dataset": arguments.dataset,
        "data": corpus.name,
        "data_fingerprint": corpus.fingerprint,
        "checkpoint": str(arguments.checkpoint),
        "checkpoint_fingerprint": fingerprint,
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
            "each",
        ),
        ("text", _text_row(report)),
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


def _text_row(report: dict[str, Any]) -> str:
    """How text became blocks."""
    rest = {
        "drop": f"{report['dropped_tokens']:,} tokens that fill no block dropped",
        "pad": "blocks that are not full padded, nothing dropped",
    }[report["remainder"]]
    packed = "documents wrapped" if report["wrap"] else "each document begins a block"
    if report["documents"] is None:
        return f"{packed}; {rest}"
    documents = {"joined": "one document", "rows": "a document a row", "all-rows": "every row"}
    made = f"detokenizer {report['detokenizer']}, {documents[report['documents']]}"
    return f"{made}, {packed}; {rest}"


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


class Progress:
    """Tells on stderr how far this process is: in place on a terminal, else now and then."""

    def __init__(self, *, shown: bool, every: float = 30.0) -> None:
        self.shown, self.every = shown, every
        self.start = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` groups of blocks."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not self.shown or not (terminal or now - self.last >= self.every):
            return
        self.last = now
        left = (now - self.start) / done * (total - done)
        line = f"group {done:,} of {total:,}, {format_duration(left)} to go"
        if terminal:
            end = "\n" if done == total else ""
            print(f"\r{line}\x1b[K", end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def text_settings(arguments: argparse.Namespace) -> "TextSettings | None":
    """How text is to become blocks; None where nothing was said and nothing is known."""
    from dataclasses import replace

    from sedd_scale.evaluation.benchmarks import BENCHMARKS
    from sedd_scale.evaluation.text_blocks import TextSettings

    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("detokenizer", "documents", "remainder", "field")
        if getattr(arguments, name) is not None
    }
    if arguments.no_wrap:
        given["wrap"] = False
    if arguments.dataset is not None:
        return replace(BENCHMARKS[arguments.dataset].text, **given)
    return TextSettings(**given) if given else None


def evaluate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The report, on the first process; collective."""
    if arguments.block_length is not None and arguments.block_length < 1:
        raise ConfigError(f"--block-length {arguments.block_length}: give at least 1")
    data = arguments.data
    if arguments.dataset is not None:
        from sedd_scale.evaluation.benchmarks import fetch_benchmark

        data = fetch_benchmark(arguments.dataset, arguments.cache_dir)
    from sedd_scale.evaluation.bound import evaluate_bound
    from sedd_scale.evaluation.corpora import open_corpus
    from sedd_scale.evaluation.plan import DEFAULT_MAX_BLOCKS
    from sedd_scale.interop.fingerprint import checkpoint_fingerprint

    model = open_model(arguments)
    is_first = model.layout.rank == 0
    most = DEFAULT_MAX_BLOCKS[arguments.protocol]
    corpus = open_corpus(
        data,
        tokenizer=model.tokenizer,
        num_tokens=model.graph.num_tokens,
        block_length=arguments.block_length,
        default_length=model.block_length,
        split=arguments.split,
        text=text_settings(arguments),
        cache_dir=arguments.cache_dir,
        max_blocks=most if arguments.max_blocks is None else arguments.max_blocks,
        name=arguments.dataset,
    )
    trained = model.block_length
    if is_first and trained is not None and corpus.block_length != trained:
        print(
            f"note: blocks of {corpus.block_length} tokens, the model was trained on {trained}",
            file=sys.stderr,
        )
    fingerprint = checkpoint_fingerprint(arguments.checkpoint) if is_first else ""
    result = evaluate_bound(
        model,
        corpus.blocks_nL,
        draws=arguments.draws,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        protocol=arguments.protocol,
        block_ids_n=corpus.block_ids_n,
        text_n=corpus.text_n,
        on_progress=Progress(shown=is_first),
        finished=finished_groups(arguments, model, corpus, fingerprint),
    )
    if not is_first:
        return None
    return report_of(arguments, result, corpus, model.objective.name, fingerprint)


def finished_groups(
    arguments: argparse.Namespace, model: "ScoreModel", corpus: "Corpus", fingerprint: str
) -> "FinishedGroups | None":
    """What --resume names, for this very evaluation."""
    if arguments.resume is None:
        return None
    from sedd_scale.evaluation.finished_groups import FinishedGroups

    names = ("weights", "precision", "tensor", "protocol", "draws", "seed", "batch_size")
    identity = {
        "checkpoint": fingerprint,
        "text": corpus.blocks_fingerprint,
        **{name.replace("_", "-"): getattr(arguments, name) for name in names},
    }
    layout = model.layout
    return FinishedGroups(
        arguments.resume, identity, rank=layout.rank, writes=layout.tensor_rank == 0
    )


def eval_command(arguments: argparse.Namespace) -> None:
    """Evaluate; the first process prints."""
    report = evaluate(arguments)
    if report is not None:
        if not arguments.json:
            print(format_table(report))
        finite = report if math.isfinite(report["perplexity"]) else {**report, "perplexity": None}
        print(json.dumps(finite))
    from sedd_scale.parallel.layout import shutdown

    shutdown()


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), eval_command))
