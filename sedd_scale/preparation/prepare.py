"""From text to a dataset: choose splits, make the tokenizer, encode, pack and write.

Documents are streamed: a first pass reads as many as it takes to know that no split is empty, a
second one samples text where a tokenizer is to be trained, and the last one encodes, in several
processes where the input is large. A journal (see journal) lets a killed preparation go on.
"""

import heapq
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd_scale.data.shards import write_index
from sedd_scale.errors import DataError, SeddScaleError
from sedd_scale.files.folder_lock import lock_folder
from sedd_scale.files.processors import available_cores
from sedd_scale.preparation import journal
from sedd_scale.preparation.documents import START, Document, DocumentStream, Place
from sedd_scale.preparation.encoding import Encoded, Encoder
from sedd_scale.preparation.packing import SplitPacker
from sedd_scale.preparation.prepare_checks import check_arguments, check_output, remove_preparation
from sedd_scale.preparation.sentencepiece_training import train_sentencepiece
from sedd_scale.preparation.shard_writer import ShardWriter
from sedd_scale.preparation.splits import SplitRule, document_hash, is_empty
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY, Tokenizer
from sedd_scale.tokenizers.gpt2 import open_gpt2
from sedd_scale.tokenizers.opening import load_tokenizer
from sedd_scale.tokenizers.sentencepiece import open_sentencepiece

DEFAULT_SENTENCEPIECE_VOCABULARY = 8192
DEFAULT_VALID_FRACTION = 0.02
DEFAULT_BLOCKS_PER_SHARD = 16_384
DEFAULT_TOKENIZER_SAMPLE = 10_000_000
# A batch is what one process encodes at a time.
BATCH_CHARACTERS = 1_000_000
BATCH_DOCUMENTS = 1_024
# Smaller inputs are done before other processes have started.
SMALL_INPUT_BYTES = 8_000_000
JOURNAL_SECONDS = 15.0


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
    packing: str = "continuous",
    dedupe: bool = False,
    processes: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the dataset of `inputs` into `output`; returns its index.

    Equal inputs and arguments give equal bytes, on any number of processes, in one go or in
    several. Where the input or the arguments are at fault the files written so far are removed;
    after any other end, a kill among them, the same call goes on where the last one was.

    Args:
        inputs: globs of files, or `builtin:python` (see documents).
        output: a directory that does not exist yet, is empty, or holds an unfinished preparation
            by the same arguments.
        block_length: L, tokens per block.
        tokenizer: sentencepiece, gpt2, bytes or text8.
        tokenizer_path: the model or vocabulary to load; without it sentencepiece is trained.
        vocab_size: N of the sentencepiece model to train; else, if given, must be the tokenizer's
            N.
        tokenizer_sample: characters of training documents that sentencepiece is trained on.
        field: the field of a .jsonl line or the column of a .parquet that holds the text.
        valid_fraction: share of documents that validate; 0: no validation split.
        test_fraction: share of documents that test; 0: no test split.
        blocks_per_shard: blocks in every shard but a split's last.
        packing: how documents fill blocks, "continuous" or "documents" (see packing).
        dedupe: keep only the first of documents with exactly equal text.
        processes: that encode; None: one for each core, or one for a small input.
        on_progress: called after every batch of documents.

    Raises:
        ConfigError: arguments that do not go together.
        DataError: an input, the tokenizer or the output directory cannot be used, or a split has
            less than one block.
    """
    check_arguments(
        block_length=block_length,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        blocks_per_shard=blocks_per_shard,
        tokenizer_sample=tokenizer_sample,
        packing=packing,
        processes=processes,
    )
    check_output(output)
    documents = DocumentStream(inputs, field=field)
    codec: Tokenizer | None = None
    if tokenizer != "sentencepiece" or tokenizer_path is not None:
        codec = _open_tokenizer(tokenizer, tokenizer_path, vocab_size)
    command = {
        "--input": documents.identity() + [[platform.python_version()]] * documents.builtin,
        "--field": field,
        "--tokenizer": [tokenizer, codec.fingerprint if codec else None],
        "--vocab-size": vocab_size,
        "--tokenizer-sample": tokenizer_sample,
        "--block-length": block_length,
        "--valid-fraction": valid_fraction,
        "--test-fraction": test_fraction,
        "--blocks-per-shard": blocks_per_shard,
        "--packing": packing,
        "--dedupe": dedupe,
    }
    existed = output.exists()
    with lock_folder(output, option="--output", name=journal.LOCK_FILE, patience=0.0):
        check_output(output)  # another may have finished it meanwhile
        state = journal.read_journal(output, command)
        try:
            rule = SplitRule(valid_fraction, test_fraction)
            rule.fit(documents)
            if processes is None:
                processes = available_cores() if documents.total_bytes > SMALL_INPUT_BYTES else 1
            if not state:
                remove_preparation(output)
                journal.write_journal(output, command=command, state={})
                if codec is None:
                    sample = _tokenizer_sample(documents, rule, tokenizer_sample, on_progress)
                    pieces = DEFAULT_SENTENCEPIECE_VOCABULARY if vocab_size is None else vocab_size
                    codec = train_sentencepiece(sample, pieces)
                codec.save(output / TOKENIZER_DIRECTORY)
            else:
                codec = load_tokenizer(output / TOKENIZER_DIRECTORY)
            with (
                Encoder[Place](codec, processes=processes) as encoder,
                _Run(output, command, state or {}, codec, rule.names) as run,
            ):
                for batch, place in encoder.run(_batches(documents.documents_after(run.place))):
                    run.add(batch, rule, place)
                    on_progress(run.progress(documents))
                fractions = {"valid_fraction": valid_fraction, "test_fraction": test_fraction}
                return run.finish(fractions)
        except SeddScaleError:
            remove_preparation(output)
            journal.remove_journal(output)
            if not existed:
                output.rmdir()
            raise


class _Run:
    """The part of a preparation that encodes and writes, and what it needs to go on later."""

    def __init__(
        self,
        output: Path,
        command: dict[str, Any],
        state: dict[str, Any],
        codec: Tokenizer,
        names: Sequence[str],
    ) -> None:
        self.place = Place(*state.get("place", START))
        self.packers: dict[str, SplitPacker] = {}
        self._output, self._command, self._codec = output, command, codec
        self._passed: int = state.get("passed", 0)
        self._duplicates: int = state.get("duplicates", 0)
        self._writers: list[ShardWriter] = []
        self._saved_shards = -1
        self._saved_at = time.monotonic()
        self._seen: journal.SeenDocuments | None = None
        if command["--dedupe"]:
            self._seen = journal.SeenDocuments(output, documents=self._passed)
        for name in names:
            split_state = state.get("splits", {}).get(name)
            writer = ShardWriter(
                output,
                name,
                block_length=command["--block-length"],
                vocab_size=codec.vocab_size,
                blocks_per_shard=command["--blocks-per-shard"],
                state=None if split_state is None else split_state["writer"],
            )
            self._writers.append(writer)
            self.packers[name] = SplitPacker(
                codec,
                writer,
                command["--block-length"],
                packing=command["--packing"],
                state=split_state,
            )

    def progress(self, documents: DocumentStream) -> Progress:
        """How far it is."""
        packers = self.packers.values()
        return Progress(
            "encoding",
            documents.bytes_read,
            documents.total_bytes,
            sum(packer.documents for packer in packers),
            sum(packer.tokens for packer in packers),
        )

    def add(self, batch: Encoded, rule: SplitRule, place: Place) -> None:
        """Write one encoded batch, and the journal when a shard was finished or it is time."""
        kept = batch.lengths > 0
        if self._seen is not None:
            first = self._seen.first_seen(batch.digests)
            self._duplicates += int((kept & ~first).sum())
            kept &= first
        splits = np.array([rule.split_of(digest) for digest in batch.digests])
        for name, packer in self.packers.items():
            packer.add(batch, kept & (splits == name))
        self._passed += len(batch.digests)
        self.place = place
        finished = sum(len(writer.shards) for writer in self._writers)
        now = time.monotonic()
        if finished != self._saved_shards or now - self._saved_at > JOURNAL_SECONDS:
            self._save()
            self._saved_shards, self._saved_at = finished, now

    def _save(self) -> None:
        state = {
            "place": list(self.place),
            "passed": self._passed,
            "duplicates": self._duplicates,
            "splits": {name: packer.save_state() for name, packer in self.packers.items()},
        }
        if self._seen is not None:
            self._seen.commit()
        journal.write_journal(self._output, command=self._command, state=state)

    def finish(self, more: dict[str, Any]) -> dict[str, Any]:
        """Complete the splits and write the index, which it returns."""
        entries = {name: packer.finish(name) for name, packer in self.packers.items()}
        index = write_index(
            self._output,
            {
                "block_length": self._command["--block-length"],
                "vocab_size": self._codec.vocab_size,
                "eos_id": self._codec.eos_id,
                "tokenizer": {"kind": self._codec.kind, "fingerprint": self._codec.fingerprint},
                "packing": self._command["--packing"],
                "duplicates_dropped": self._duplicates if self._command["--dedupe"] else None,
                **more,
                "splits": entries,
            },
        )
        journal.remove_journal(self._output)
        return index

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self._seen is not None:
            self._seen.close()
        for writer in self._writers:
            writer.release()


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


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], Place]]:
    """Non-empty documents in batches of a bounded size, each with the place behind it."""
    batch: list[str] = []
    characters = 0
    place = START
    for document in documents:
        if is_empty(document):
            continue
        batch.append(document.text)
        place = document.after
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch, place
            batch, characters = [], 0
    if batch:
        yield batch, place
