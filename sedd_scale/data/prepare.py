"""From text to a dataset: choose splits, make the tokenizer, encode, pack and write.

Documents are streamed: a first pass reads as many as it takes to know that no split is empty, a
second one samples text where a tokenizer is to be trained, and the last one encodes.
"""

import contextlib
import heapq
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.data import shards
from sedd_scale.data.documents import Document, DocumentStream
from sedd_scale.data.packing import SplitPacker
from sedd_scale.data.sentencepiece_training import train_sentencepiece
from sedd_scale.data.shards import ShardWriter, write_index
from sedd_scale.data.splits import SplitRule, document_hash, is_empty
from sedd_scale.data.tokenizers import (
    KINDS,
    BytesTokenizer,
    Text8Tokenizer,
    Tokenizer,
    open_gpt2,
    open_sentencepiece,
)
from sedd_scale.errors import ConfigError, DataError

DEFAULT_SENTENCEPIECE_VOCABULARY = 8192
DEFAULT_VALID_FRACTION = 0.02
DEFAULT_BLOCKS_PER_SHARD = 16_384
DEFAULT_TOKENIZER_SAMPLE = 10_000_000
BATCH_CHARACTERS = 4_000_000
BATCH_DOCUMENTS = 4_096

_OURS = re.compile(r"(train|valid|test)-\d{6}\.tar(\.tmp)?|index\.json\.tmp")


class Progress(NamedTuple):
    """How far a preparation is; `total_bytes` is 0 where the input has no size on disk."""

    stage: str
    bytes_read: int
    total_bytes: int
    documents: int
    tokens: int


def prepare(
    inputs: Sequence[str],
    *,
    output: Path,
    block_length: int,
    tokenizer: str,
    tokenizer_path: Path | None = None,
    vocab_size: int | None = None,
    tokenizer_sample: int = DEFAULT_TOKENIZER_SAMPLE,
    field: str = "text",
    valid_fraction: float = DEFAULT_VALID_FRACTION,
    test_fraction: float = 0.0,
    blocks_per_shard: int = DEFAULT_BLOCKS_PER_SHARD,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the dataset of `inputs` into `output`; returns its index.

    Equal inputs and arguments give equal bytes. On any failure the files written so far are
    removed.

    Args:
        inputs: globs of .txt and .jsonl files, or `builtin:python` (see documents).
        output: a directory that does not exist yet, is empty, or holds an unfinished preparation.
        block_length: L, tokens per block.
        tokenizer: sentencepiece, gpt2, bytes or text8.
        tokenizer_path: the model or vocabulary to load; without it sentencepiece is trained.
        vocab_size: N of the sentencepiece model to train; else, if given, must be the tokenizer's
            N.
        tokenizer_sample: characters of training documents that sentencepiece is trained on.
        field: the field of a .jsonl line that holds the text.
        valid_fraction: share of documents that validate; 0: no validation split.
        test_fraction: share of documents that test; 0: no test split.
        blocks_per_shard: blocks in every shard but a split's last.
        on_progress: called after every batch of documents.

    Raises:
        ConfigError: arguments that do not go together.
        DataError: an input, the tokenizer or the output directory cannot be used, or a split has
            less than one block.
    """
    _check_arguments(
        block_length=block_length,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        blocks_per_shard=blocks_per_shard,
        tokenizer_sample=tokenizer_sample,
    )
    _check_output(output)
    documents = DocumentStream(inputs, field=field)
    rule = SplitRule(valid_fraction, test_fraction)
    rule.fit(documents)
    codec: Tokenizer
    if tokenizer == "sentencepiece" and tokenizer_path is None:
        sample = _tokenizer_sample(documents, rule, tokenizer_sample, on_progress)
        pieces = DEFAULT_SENTENCEPIECE_VOCABULARY if vocab_size is None else vocab_size
        codec = train_sentencepiece(sample, pieces)
    else:
        codec = _open_tokenizer(tokenizer, tokenizer_path, vocab_size)

    with contextlib.ExitStack() as undo:
        _clear_output(output, undo)
        undo.callback(shutil.rmtree, output / shards.TOKENIZER_DIRECTORY, ignore_errors=True)
        packers = {}
        for name in rule.names:
            writer = ShardWriter(
                output,
                name,
                block_length=block_length,
                vocab_size=codec.vocab_size,
                blocks_per_shard=blocks_per_shard,
            )
            undo.callback(writer.abandon)
            packers[name] = SplitPacker(codec, writer, block_length)

        for batch in _batches(documents):
            for text, ids in zip(batch, codec.encode_batch(batch), strict=True):
                if ids.size:
                    packers[rule.split_of(document_hash(text))].add(text, ids)
            for packer in packers.values():
                packer.flush()
            on_progress(
                Progress(
                    "encoding",
                    documents.bytes_read,
                    documents.total_bytes,
                    sum(packer.documents for packer in packers.values()),
                    sum(packer.tokens for packer in packers.values()),
                )
            )

        entries = {name: packer.finish(name) for name, packer in packers.items()}
        codec.save(output / shards.TOKENIZER_DIRECTORY)
        index = write_index(
            output,
            {
                "block_length": block_length,
                "vocab_size": codec.vocab_size,
                "eos_id": codec.eos_id,
                "tokenizer": {"kind": codec.kind, "fingerprint": codec.fingerprint},
                "valid_fraction": valid_fraction,
                "test_fraction": test_fraction,
                "splits": entries,
            },
        )
        undo.pop_all()
    return index


def _check_arguments(
    *,
    block_length: int,
    tokenizer: str,
    tokenizer_path: Path | None,
    valid_fraction: float,
    test_fraction: float,
    blocks_per_shard: int,
    tokenizer_sample: int,
) -> None:
    for name, count in (
        ("--block-length", block_length),
        ("--blocks-per-shard", blocks_per_shard),
        ("--tokenizer-sample", tokenizer_sample),
    ):
        if count < 1:
            raise ConfigError(f"{name} {count} is not positive: give at least 1")
    if tokenizer not in KINDS:
        raise ConfigError(f"--tokenizer {tokenizer} is unknown: give one of {', '.join(KINDS)}")
    if tokenizer == "gpt2" and tokenizer_path is None:
        raise ConfigError(
            "--tokenizer gpt2 needs --tokenizer-path: the directory of vocab.json and merges.txt"
        )
    if tokenizer in ("bytes", "text8") and tokenizer_path is not None:
        raise ConfigError(f"--tokenizer {tokenizer} has no files: leave --tokenizer-path out")
    for name, fraction in (("valid", valid_fraction), ("test", test_fraction)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"--{name}-fraction {fraction} is not in [0, 1): give such as 0.02")
    if valid_fraction + test_fraction >= 1:
        raise ConfigError(
            f"--valid-fraction {valid_fraction} and --test-fraction {test_fraction} leave nothing "
            "to train on: give less than 1 together"
        )


def _check_output(output: Path) -> None:
    """Refuse a directory with a dataset or with anything that is not ours to replace."""
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"--output {output} is a file: give a directory")
    if (output / shards.INDEX_FILE).exists():
        raise DataError(
            f"--output {output} already holds a dataset; give another --output or remove it"
        )
    names = sorted(entry.name for entry in output.iterdir())
    # A preparation that was killed may have written the tokenizer, but never before a shard.
    if any(_OURS.fullmatch(name) for name in names) and shards.TOKENIZER_DIRECTORY in names:
        names.remove(shards.TOKENIZER_DIRECTORY)
    for name in names:
        if _OURS.fullmatch(name) is None:
            raise DataError(
                f"--output {output} is not empty (it holds {name}); give a new directory"
            )


def _clear_output(output: Path, undo: contextlib.ExitStack) -> None:
    """Make the directory, without what an unfinished preparation left in it."""
    if not output.exists():
        output.mkdir(parents=True)
        undo.callback(_remove_if_empty, output)
    for entry in output.iterdir():
        if _OURS.fullmatch(entry.name) is not None:
            entry.unlink()


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _open_tokenizer(kind: str, path: Path | None, vocab_size: int | None) -> Tokenizer:
    codec: Tokenizer
    if kind == "sentencepiece":
        assert path is not None
        codec = open_sentencepiece(path)
    elif kind == "gpt2":
        assert path is not None
        codec = open_gpt2(path)
    else:
        codec = BytesTokenizer() if kind == "bytes" else Text8Tokenizer()
    if vocab_size is not None and vocab_size != codec.vocab_size:
        raise DataError(
            f"--vocab-size {vocab_size} does not fit the {kind} tokenizer, which has "
            f"{codec.vocab_size} tokens: leave --vocab-size out"
        )
    return codec


def _tokenizer_sample(
    documents: DocumentStream,
    rule: SplitRule,
    wanted: int,
    on_progress: Callable[[Progress], None],
) -> list[str]:
    """Training documents of about `wanted` characters in all: those with the smallest
    hashes.

    The part of the hash that decides is not the one that decides the split.
    """
    largest_first: list[tuple[int, str]] = []
    total = 0
    for number, document in enumerate(documents, start=1):
        digest = document_hash(document.text)
        if is_empty(document) or rule.split_of(digest) != "train":
            continue
        text = document.text[:wanted]
        heapq.heappush(largest_first, (-int.from_bytes(digest[8:16], "big"), text))
        total += len(text)
        while total - len(largest_first[0][1]) >= wanted:
            total -= len(heapq.heappop(largest_first)[1])
        if number % BATCH_DOCUMENTS == 0:
            on_progress(
                Progress("sampling", documents.bytes_read, documents.total_bytes, number, 0)
            )
    on_progress(Progress("training the tokenizer", 0, 0, len(largest_first), 0))
    return [text for _, text in sorted(largest_first, reverse=True)]


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Non-empty documents in batches of a bounded size, large enough to keep all cores busy."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        if is_empty(document):
            continue
        batch.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
