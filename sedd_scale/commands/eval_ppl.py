"""Bound the perplexity of a trained model on text."""

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from sedd_scale.cli import Command, count, given_path, make_parser, need_stdout, print_result
from sedd_scale.evaluation import DATASETS, DOCUMENTS, PROTOCOLS, REMAINDERS
from sedd_scale.evaluation.detokenizers import DETOKENIZERS
from sedd_scale.interop.model_arguments import add_model_arguments, open_model
from sedd_scale.preparation.documents import FORMAT_HELP, add_format_options

if TYPE_CHECKING:
    from sedd_scale.evaluation.finished_groups import FinishedGroups
    from sedd_scale.evaluation.text_blocks import EvaluationText, TextSettings
    from sedd_scale.model.score_model import ScoreModel


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale eval_ppl",
        "Bound the perplexity of a trained model on text: a table, then one line of JSON.",
        "torchrun --nproc-per-node 2 -m sedd_scale eval_ppl --checkpoint runs/books "
        "--data data/books",
    )
    add_model_arguments(parser, leave_out=("block_length",))
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        metavar="PATH",
        help="a prepared dataset (a directory, a URL, or pipe: and a command), or a file as "
        f"prepare_data reads it: {FORMAT_HELP}",
    )
    add_format_options(parser)
    source.add_argument(
        "--dataset",
        choices=DATASETS,
        metavar="NAME",
        help=f"the test text of a benchmark, from the Hugging Face hub: {', '.join(DATASETS)}",
    )
    add("--split", help="split of a prepared dataset (valid)")
    add(
        "--cache-dir",
        type=given_path,
        metavar="DIR",
        help="cache of a remote dataset's files (in the temporary directory; for the hub its "
        "client's cache)",
    )
    add(
        "--detokenizer",
        choices=DETOKENIZERS,
        help="rules that undo a benchmark's tokenisation, row by row, for a file (none; those of "
        "the --dataset)",
    )
    add(
        "--documents",
        choices=DOCUMENTS,
        help="joined: all rows are one document; rows: each is one, blank ones skipped; all-rows: "
        "blank ones too, as SEDD's code packed its benchmarks (rows of a table, others joined)",
    )
    add(
        "--no-wrap",
        action="store_true",
        help="begin each document in a new block (otherwise one stream is cut into blocks)",
    )
    add(
        "--remainder",
        choices=REMAINDERS,
        help="tokens that fill no block (drop; with --no-wrap pad); both are reported",
    )
    add(
        "--block-length",
        type=count,
        metavar="L",
        help="tokens per block, for a file (the checkpoint's)",
    )
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
        help="times drawn per block (16; paper 1000), or orders (any-order 8); none for an "
        "autoregressive model, whose likelihood is exact",
    )
    add(
        "--max-blocks",
        type=count,
        metavar="K",
        help="evaluate at most K blocks, evenly spread (all; paper 1024; any-order 64)",
    )
    add("--seed", type=int, default=0, metavar="I", help="seed of all draws (%(default)s)")
    add(
        "--batch-size",
        type=count,
        default=16,
        metavar="B",
        help="sequences at a time (%(default)s)",
    )
    add(
        "--resume",
        type=given_path,
        metavar="DIR",
        help="keep finished blocks there; killed and started again, the same command resumes, with "
        "any number of processes",
    )
    add(
        "--output",
        type=given_path,
        metavar="FILE.json",
        help="also write the line of JSON there",
    )
    add("--json", action="store_true", help="print only the line of JSON")
    return parser


def text_settings(arguments: argparse.Namespace) -> "TextSettings | None":
    """How text is to become blocks; None where nothing was said and nothing is known."""
    from dataclasses import replace

    from sedd_scale.evaluation.benchmarks import BENCHMARKS
    from sedd_scale.evaluation.text_blocks import TextSettings

    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("detokenizer", "documents", "remainder", "field", "format", "members")
        if getattr(arguments, name) is not None
    }
    if arguments.no_wrap:
        given["wrap"] = False
    if arguments.dataset is not None:
        return replace(BENCHMARKS[arguments.dataset].text, **given)
    return TextSettings(**given) if given else None


def evaluate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The report, on the first process; collective."""
    data = arguments.data
    if arguments.dataset is not None:
        from sedd_scale.evaluation.benchmarks import fetch_benchmark

        data = fetch_benchmark(arguments.dataset, arguments.cache_dir)
    from sedd_scale.evaluation.bound import evaluate_bound
    from sedd_scale.evaluation.corpora import open_corpus
    from sedd_scale.evaluation.draw_plan import DEFAULT_MAX_BLOCKS
    from sedd_scale.evaluation.report import Progress, report_of
    from sedd_scale.interop.fingerprint import checkpoint_fingerprint
    from sedd_scale.tokenizers.base import warn_of_unknown

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
    if is_first:
        warn_of_unknown(corpus.unknown_share, corpus.name)
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
    return report_of(
        result,
        corpus,
        objective=model.objective.name,
        seed=arguments.seed,
        dataset=arguments.dataset,
        checkpoint=str(arguments.checkpoint),
        checkpoint_fingerprint=fingerprint,
        weights=arguments.weights,
    )


def finished_groups(
    arguments: argparse.Namespace, model: "ScoreModel", corpus: "EvaluationText", fingerprint: str
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
    if arguments.output is None:
        need_stdout("--output FILE.json")
    else:
        from sedd_scale.files.atomic import refuse_existing_output

        refuse_existing_output(arguments.output)
    report = evaluate(arguments)
    if report is not None:
        from sedd_scale.evaluation.report import format_table
        from sedd_scale.files.atomic import write_atomically

        finite = report if math.isfinite(report["perplexity"]) else {**report, "perplexity": None}
        line = json.dumps(finite)
        try:
            if arguments.output is not None:
                write_atomically(arguments.output, f"{line}\n".encode())
        finally:
            print_result(line if arguments.json else f"{format_table(report)}\n{line}")
    from sedd_scale.parallel.layout import shutdown

    shutdown()


COMMANDS = {"": Command(build_parser, eval_command)}
