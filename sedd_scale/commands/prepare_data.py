"""Turn text into a tokenised dataset: webdataset shards, their index and the tokenizer.

`sedd-scale prepare_data inspect PATH` shows what a dataset holds and verifies it.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

from sedd_scale.cli import Command, at_least, count, given_path, make_parser
from sedd_scale.preparation.documents import FORMAT_HELP, add_format_options
from sedd_scale.preparation.inspection import inspect_dataset
from sedd_scale.preparation.packing import PACKINGS
from sedd_scale.preparation.prepare import Progress, prepare
from sedd_scale.preparation.report import format_report
from sedd_scale.preparation.settings import (
    DEFAULT_BLOCKS_PER_SHARD,
    DEFAULT_SENTENCEPIECE_VOCABULARY,
    DEFAULT_TOKENIZER_SAMPLE,
    DEFAULT_VALID_FRACTION,
    Preparation,
)
from sedd_scale.tokenizers.base import warn_of_unknown
from sedd_scale.tokenizers.opening import TOKENIZERS

CHOICES = [field for field in fields(Preparation) if field.name != "inputs"]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale prepare_data",
        "Turn text into tokenised webdataset shards with an index. `prepare_data inspect DATASET` "
        "shows one.",
        "sedd-scale prepare_data --input 'corpus/*.jsonl.xz' --tokenizer sentencepiece "
        "--vocab-size 8192 --block-length 256 --output data/corpus",
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        action="extend",
        metavar="GLOB",
        help=f"files: {FORMAT_HELP}; or builtin:python for text of this Python",
    )
    add_format_options(parser, "text")
    add("--tokenizer", choices=tuple(TOKENIZERS), required=True, help="kind of tokenizer")
    add(
        "--tokenizer-path",
        type=given_path,
        metavar="PATH",
        help="hf: a Hugging Face tokenizer.json or its directory; sentencepiece: a .model file to "
        "load instead of training one; gpt2: the directory of vocab.json and merges.txt, or "
        "vocab.json itself",
    )
    add(
        "--vocab-size",
        type=count,
        metavar="N",
        help=f"tokens of the sentencepiece model to train ({DEFAULT_SENTENCEPIECE_VOCABULARY})",
    )
    add(
        "--tokenizer-sample",
        type=count,
        default=DEFAULT_TOKENIZER_SAMPLE,
        metavar="C",
        help="characters of text to train sentencepiece on (%(default)s)",
    )
    add("--block-length", type=count, required=True, metavar="L", help="tokens per block")
    add(
        "--output",
        type=given_path,
        required=True,
        metavar="DIR",
        help="directory of the new dataset",
    )
    add(
        "--valid-fraction",
        type=float,
        default=DEFAULT_VALID_FRACTION,
        metavar="F",
        help="share of documents kept for validation (%(default)s)",
    )
    add(
        "--test-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of documents kept for testing (%(default)s)",
    )
    add(
        "--blocks-per-shard",
        type=count,
        default=DEFAULT_BLOCKS_PER_SHARD,
        metavar="K",
        help="blocks per shard (%(default)s)",
    )
    add(
        "--packing",
        choices=PACKINGS,
        default=PACKINGS[0],
        help="continuous: one stream of documents, cut every L tokens; documents: documents that "
        "fit a block are not cut, the rest of a block is padding (%(default)s)",
    )
    add(
        "--dedupe",
        action="store_true",
        help="keep only the first of documents with exactly equal text",
    )
    add(
        "--processes",
        type=count,
        metavar="P",
        help="processes that encode (one for each core; one for a small input)",
    )
    return parser


def build_inspect_parser() -> argparse.ArgumentParser:
    """The arguments of `inspect`."""
    parser = make_parser(
        "sedd-scale prepare_data inspect",
        "Show what a dataset holds, decode a few blocks, and compare every shard with its SHA-256.",
        "sedd-scale prepare_data inspect data/corpus --num-blocks 2",
    )
    parser.add_argument("path", metavar="PATH", help="directory, URL or pipe: of a dataset")
    parser.add_argument(
        "--num-blocks",
        type=at_least(0),
        default=3,
        metavar="K",
        help="blocks to decode (%(default)s)",
    )
    parser.add_argument("--split", default="train", help="split to decode from (%(default)s)")
    parser.add_argument(
        "--characters",
        type=at_least(0),
        default=400,
        metavar="C",
        help="characters shown of each block (%(default)s)",
    )
    parser.add_argument(
        "--cache-dir",
        type=given_path,
        default=None,
        metavar="DIR",
        help="where the files of a remote dataset are kept (a temporary directory)",
    )
    return parser


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None, counts="")

        def show(progress: Progress) -> None:
            bar.update(
                task,
                description=progress.stage,
                total=progress.total_bytes or None,
                completed=progress.bytes_read,
                counts=f"{progress.documents:,} documents, {progress.tokens:,} tokens",
            )

        yield show


def prepare_command(arguments: argparse.Namespace) -> None:
    """Prepare the dataset and print its report, the output's path last."""
    start = time.perf_counter()
    with progress_bar() as show:
        chosen = {field.name: getattr(arguments, field.name) for field in CHOICES}
        index = prepare(
            arguments.input,
            output=arguments.output,
            processes=arguments.processes,
            on_progress=show,
            **chosen,
        )
    seconds = time.perf_counter() - start
    tokens = sum(split["tokens"] for split in index["splits"].values())
    for name, split in index["splits"].items():
        warn_of_unknown(split["unknown_tokens"] / split["tokens"], f"the {name} split")
    print(format_report(index))
    print(f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    print(arguments.output)


def inspect_command(arguments: argparse.Namespace) -> None:
    """Print what `inspect` found; an error where a shard is damaged."""
    with contextlib.ExitStack() as stack:
        cache_dir = arguments.cache_dir
        if cache_dir is None:
            cache_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for line in inspect_dataset(
            arguments.path,
            split=arguments.split,
            num_blocks=arguments.num_blocks,
            characters=arguments.characters,
            cache_dir=cache_dir,
        ):
            print(line, flush=True)


COMMANDS = {
    "": Command(build_parser, prepare_command),
    "inspect": Command(build_inspect_parser, inspect_command),
}
