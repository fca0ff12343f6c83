"""From text to a dataset: choose splits, make the tokenizer, encode, pack and write.

Documents are streamed: a first pass reads as many as it takes to know that no split is empty, a
second one samples text where a tokenizer is to be trained, and the last one encodes, in several
processes where the input is large. A journal (see journal) lets a killed preparation be continued.
"""

import errno
import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sedd_scale.data.shards import write_index
from sedd_scale.errors import ConfigError, DataError, SeddScaleError
from sedd_scale.files.folder_lock import lock_folder
from sedd_scale.files.processors import available_cores
from sedd_scale.preparation import journal
from sedd_scale.preparation.document_formats import BLANK, HYPHEN, TOKENISED
from sedd_scale.preparation.documents import START, DocumentStream, Place
from sedd_scale.preparation.encoding import Encoded, Encoder
from sedd_scale.preparation.output_folder import check_output, remove_preparation
from sedd_scale.preparation.packing import SplitPacker
from sedd_scale.preparation.sentencepiece_training import train_sentencepiece
from sedd_scale.preparation.settings import DEFAULT_SENTENCEPIECE_VOCABULARY, Preparation
from sedd_scale.preparation.shard_writer import ShardWriter
from sedd_scale.preparation.splits import SplitRule, document_hash, is_empty
from sedd_scale.tokenizers.base import RESPELLED, TOKENIZER_DIRECTORY, Tokenizer
from sedd_scale.tokenizers.opening import TOKENIZERS, load_tokenizer

# A batch is what one process encodes at a time.
BATCH_CHARACTERS = 1_000_000
BATCH_DOCUMENTS = 1_024
# Smaller inputs are done before other processes have started.
SMALL_INPUT_BYTES = 8_000_000
JOURNAL_SECONDS = 15.0
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_TOKENS = "documents that the tokenizer has no token for, left out"

Tag = tuple[Place, Counter[str]]


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
    processes: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **choices: Any,
) -> dict[str, Any]:
    """Write the dataset of `inputs` into `output`; returns its index.

    Equal inputs and choices give equal bytes, on any number of processes, in one call or in
    several. Where the input or the choices are at fault the files written so far are removed; after
    any other end, a kill among them, the same call continues where the last one ended.

    Args:
        inputs: globs of files, or `builtin:python` (see documents).
        output: a directory that does not exist yet, is empty, or holds an unfinished preparation
            with the same choices.
        processes: that encode; None: one for each core, or one for a small input.
        on_progress: called after every batch of documents.
        choices: the other attributes of `Preparation`.

    Raises:
        ConfigError: choices that do not go together, or not those of the unfinished preparation.
        DataError: an input, the tokenizer or the output directory cannot be used, or a split has
            less than one block.
    """
    chosen = Preparation(inputs, **choices)
    chosen.check()
    most = max(64, 4 * available_cores())
    if processes is not None and not 1 <= processes <= most:
        raise ConfigError(f"--processes {processes} is too many here: give 1 to {most}")
    check_output(output)
    documents = DocumentStream(
        inputs, field=chosen.field, format=chosen.format, members=chosen.members
    )
    codec: Tokenizer | None = None
    if chosen.tokenizer_path is not None or not TOKENIZERS[chosen.tokenizer].trained:
        codec = _open_tokenizer(chosen)
    identity = chosen.identity(documents, codec)
    existed = output.exists()
    with lock_folder(output, option="--output", name=journal.LOCK_FILE, patience=0.0):
        check_output(output)  # another may have finished it meanwhile
        state = journal.read_journal(output, identity)
        try:
            rule = SplitRule(chosen.valid_fraction, chosen.test_fraction)
            rule.fit(documents)
            if processes is None:
                processes = available_cores() if documents.total_bytes > SMALL_INPUT_BYTES else 1
            if not state:
                remove_preparation(output)
                journal.write_journal(output, command=identity, state={})
                if codec is None:
                    wanted = chosen.tokenizer_sample
                    sample = _tokenizer_sample(documents, rule, wanted, on_progress)
                    own = chosen.vocab_size
                    own = DEFAULT_SENTENCEPIECE_VOCABULARY if own is None else own
                    codec = train_sentencepiece(sample, own)
                codec.save(output / TOKENIZER_DIRECTORY)
            else:
                codec = load_tokenizer(output / TOKENIZER_DIRECTORY)
            with (
                Encoder[Tag](codec, processes=processes) as encoder,
                _Run(output, chosen, identity, state or {}, codec, rule.names) as run,
            ):
                for batch, tag in encoder.run(_batches(documents, run.place)):
                    run.add(batch, rule, *tag)
                    on_progress(run.progress(documents))
                return run.finish(documents.notes)
        except SeddScaleError:
            remove_preparation(output)
            journal.remove_journal(output)
            if not existed:
                output.rmdir()
            raise
        except OSError as error:
            if error.filename is not None or error.errno not in NO_ROOM:
                raise
            raise DataError(
                f"--output {output} cannot be written: {error.strerror}; mend that and give the "
                "same command again to continue"
            ) from error


class _Run:
    """The part of a preparation that encodes and writes, and what continuing it later needs."""

    def __init__(
        self,
        output: Path,
        chosen: Preparation,
        identity: dict[str, Any],
        state: dict[str, Any],
        codec: Tokenizer,
        names: Sequence[str],
    ) -> None:
        self.place = Place(*state.get("place", START))
        self.packers: dict[str, SplitPacker] = {}
        self._output, self._chosen, self._identity, self._codec = output, chosen, identity, codec
        self._passed: int = state.get("passed", 0)
        self._duplicates: int = state.get("duplicates", 0)
        self._before: Counter[str] = Counter(state.get("notes", {}))
        self._notes = self._before
        self._saved_shards = -1
        self._saved_at = time.monotonic()
        self._seen: journal.SeenDocuments | None = None
        if chosen.dedupe:
            self._seen = journal.SeenDocuments(output, documents=self._passed)
        for name in names:
            split_state = state.get("splits", {}).get(name)
            writer = ShardWriter(
                output,
                name,
                block_length=chosen.block_length,
                vocab_size=codec.vocab_size,
                blocks_per_shard=chosen.blocks_per_shard,
                state=None if split_state is None else split_state["writer"],
            )
            self.packers[name] = SplitPacker(
                codec,
                writer,
                chosen.block_length,
                packing=chosen.packing,
                state=split_state,
            )

    def progress(self, documents: DocumentStream) -> Progress:
        """How far it is."""
        packers = self.packers.values()
        return Progress(
            "encoding",
            documents.bytes_read,
            documents.total_bytes,
            sum(packer.totals["documents"] for packer in packers),
            sum(packer.totals["tokens"] for packer in packers),
        )

    def add(self, batch: Encoded, rule: SplitRule, place: Place, notes: Counter[str]) -> None:
        """Write one encoded batch, and the journal when a shard was finished or it is time.

        Args:
            place: behind the batch.
            notes: of the documents so far, since this run began.
        """
        kept = batch.lengths > 0
        self._before += Counter({NO_TOKENS: int((~kept).sum()), RESPELLED: batch.respelled})
        self._notes = self._before + notes
        if self._seen is not None:
            first = self._seen.first_seen(batch.digests)
            self._duplicates += int((kept & ~first).sum())
            kept &= first
        splits = np.array([rule.split_of(digest) for digest in batch.digests])
        for name, packer in self.packers.items():
            packer.add(batch, kept & (splits == name))
        self._passed += len(batch.digests)
        self.place = place
        finished = sum(len(packer.writer.shards) for packer in self.packers.values())
        now = time.monotonic()
        if finished != self._saved_shards or now - self._saved_at > JOURNAL_SECONDS:
            self._save()
            self._saved_shards, self._saved_at = finished, now

    def _save(self) -> None:
        state = {
            "place": list(self.place),
            "passed": self._passed,
            "duplicates": self._duplicates,
            "notes": self._notes,
            "splits": {name: packer.save_state() for name, packer in self.packers.items()},
        }
        if self._seen is not None:
            self._seen.commit()
        journal.write_journal(self._output, command=self._identity, state=state)

    def finish(self, notes: Counter[str]) -> dict[str, Any]:
        """Complete the splits and write the index, which it returns; `notes` as of `add`."""
        notes = self._before + notes
        entries = {name: packer.finish(name) for name, packer in self.packers.items()}
        index = write_index(
            self._output,
            {
                "block_length": self._chosen.block_length,
                "vocab_size": self._codec.vocab_size,
                "eos_id": self._codec.eos_id,
                "tokenizer": {"kind": self._codec.kind, "fingerprint": self._codec.fingerprint},
                "packing": self._chosen.packing,
                "duplicates_dropped": self._duplicates if self._chosen.dedupe else None,
                "valid_fraction": self._chosen.valid_fraction,
                "test_fraction": self._chosen.test_fraction,
                "splits": entries,
                **({"notes": dict(sorted(notes.items()))} if notes else {}),
            },
        )
        journal.remove_journal(self._output)
        return index

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        if self._seen is not None:
            self._seen.close()
        for packer in self.packers.values():
            packer.writer.release()


def _open_tokenizer(chosen: Preparation) -> Tokenizer:
    made, path = TOKENIZERS[chosen.tokenizer], chosen.tokenizer_path
    codec = made.of_files({}) if path is None else made.open(path)
    if chosen.vocab_size is not None and chosen.vocab_size != codec.vocab_size:
        raise DataError(
            f"--vocab-size {chosen.vocab_size} does not fit the {codec.kind} tokenizer, which has "
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


def _batches(documents: DocumentStream, start: Place) -> Iterator[tuple[list[str], Tag]]:
    """Non-empty documents in batches of a bounded size, each with the place behind it."""
    batch: list[str] = []
    characters = 0
    for document in documents.documents_after(start):
        if is_empty(document):
            documents.notes[BLANK] += 1
            continue
        documents.notes[TOKENISED] += HYPHEN in document.text
        batch.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch, (document.after, Counter(documents.notes))
            batch, characters = [], 0
    if batch:
        yield batch, (document.after, Counter(documents.notes))
