"""Text to blocks of tokens, with every choice that moves a perplexity named.

Rows (lines of a text file, of a .jsonl, of a table) are detokenised one by one and become
documents; each document's ids are followed by EOS. Documents are wrapped into one stream that is
cut into blocks of L, or each begins a block of its own; what fills no block is dropped or padded.
Padding is EOS, has no noise and no part in the numbers.
"""

import hashlib
import io
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.evaluation.detokenizers import DETOKENIZERS
from sedd_scale.preparation.document_formats import ARCHIVES, BLANK, HYPHEN, TOKENISED
from sedd_scale.preparation.documents import DocumentStream, format_of
from sedd_scale.tokenizers.base import RESPELLED, Tokenizer

# WikiText's rows keep the end of their line in every edition of it; those of other sources do not.
_KEEPS_LINE_ENDS = ("wikitext",)


@dataclass(frozen=True)
class TextSettings:
    """How text becomes blocks.

    Attributes:
        detokenizer: of `DETOKENIZERS`, for each row.
        documents: of `DOCUMENTS`; "joined": all rows are one document; "rows": each is one, blank
            ones left out; "all-rows": blank ones too, which is how SEDD's code packed its
            benchmarks; None: joined for a text, rows for a file of rows or an archive of files.
        wrap: documents follow each other within a block; without it each begins a block.
        remainder: what becomes of tokens that fill no block, at the end of the stream or of each
            document; "drop" or "pad"; None: drop with wrap, pad without.
        field: of a .jsonl line or column of a .parquet, the text; None: "text".
        format, members: as of `DocumentStream`.
        last_rows: the number of rows, the last ones; None: all.
    """

    detokenizer: str = "none"
    documents: str | None = None
    wrap: bool = True
    remainder: str | None = None
    field: str | None = None
    format: str | None = None
    members: str | None = None
    last_rows: int | None = None


@dataclass(frozen=True)
class EvaluationText:
    """Blocks to evaluate.

    Attributes:
        name: where they come from.
        blocks_nL: token ids.
        text_n: how many of each block's first tokens are text; the rest is padding.
        block_ids_n: number of each block within the source.
        source_blocks: whole blocks in the source, of which these are some or all.
        dropped_tokens: tokens of the source in no whole block.
        characters_per_token: of the source, EOS counted as tokens; characters as the tokenizer
            spells them.
        bytes_per_token: the same in UTF-8 bytes.
        fingerprint: SHA-256 of the source; None of a text in memory.
        detokenizer, documents: how text was read; None for a prepared dataset, which has tokens.
        wrap: whether documents follow each other within blocks.
        remainder: what became of tokens that filled no block, "drop" or "pad".
        unknown_share: of the source's tokens, those that stand for what the tokenizer cannot spell.
        notes: what reading left out or changed, counted.
    """

    name: str
    blocks_nL: IntArray
    text_n: IntArray
    block_ids_n: IntArray
    source_blocks: int
    dropped_tokens: int
    characters_per_token: float
    bytes_per_token: float
    wrap: bool
    remainder: str
    unknown_share: float
    notes: Mapping[str, int]
    fingerprint: str | None = None
    detokenizer: str | None = None
    documents: str | None = None

    @property
    def block_length(self) -> int:
        """L."""
        return int(self.blocks_nL.shape[1])

    @property
    def blocks_fingerprint(self) -> str:
        """SHA-256 of the blocks themselves, their numbers and their lengths."""
        digest = hashlib.sha256(str(self.blocks_nL.shape).encode())
        for array in (self.blocks_nL, self.text_n, self.block_ids_n):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def read_blocks(
    path: Path, tokenizer: Tokenizer, block_length: int, settings: TextSettings
) -> EvaluationText:
    """The blocks of a file.

    Raises:
        DataError: it is empty, no text, not UTF-8, damaged, or has no whole block, or its name
            leaves open what it holds.
        ConfigError: a field or members of a file that has none.
    """
    field = settings.field or "text"
    stream = DocumentStream(
        [str(path)], field=field, format=settings.format, members=settings.members, in_pieces=False
    )
    format = stream.format = format_of(path, settings.format)
    mode = settings.documents or ("joined" if format == "text" else "rows")
    remainder = settings.remainder or ("drop" if settings.wrap else "pad")

    def texts() -> Iterator[str]:
        for text in _documents(stream, mode, settings):
            stream.notes[TOKENISED] += settings.detokenizer == "none" and HYPHEN in text
            if text.strip() or mode == "all-rows":
                yield text
            elif format != "text":
                stream.notes[BLANK] += 1

    found = cut_documents(
        texts(), tokenizer, block_length, wrap=settings.wrap, remainder=remainder, name=str(path)
    )
    return replace(
        found,
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        detokenizer=settings.detokenizer,
        documents=mode,
        notes=Counter(found.notes) + stream.notes,
    )


def cut_documents(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    block_length: int,
    *,
    wrap: bool = True,
    remainder: str = "drop",
    name: str,
) -> EvaluationText:
    """The blocks of documents, each followed by EOS; the arguments are those of `TextSettings`.

    Raises:
        DataError: no text, or no whole block; it calls the text `name`.
    """
    eos = np.array([tokenizer.eos_id], dtype=np.int64)
    documents: list[npt.NDArray[np.int32]] = []
    characters = utf8_bytes = respelled = 0
    for text in texts:
        spelled = tokenizer.normalize(text)
        characters += len(spelled)
        utf8_bytes += len(spelled.encode())
        respelled += spelled != text
        documents.append(np.concatenate([tokenizer.encode(text), eos]).astype(np.int32))
    if not characters:
        raise DataError(f"{name} holds no text: give text that does")
    tokens = sum(map(len, documents))
    streams = [np.concatenate(documents)] if wrap else documents
    if remainder == "drop" and max(map(len, streams)) < block_length:
        what = "" if wrap else " in its longest document"
        raise DataError(
            f"{name} has {max(map(len, streams))} tokens{what}, less than one block of "
            f"{block_length}: give more text, a shorter block length, or remainder pad"
        )
    parts = [_cut(stream, block_length, tokenizer.eos_id, remainder) for stream in streams]
    blocks_nL = np.concatenate([blocks for blocks, _ in parts])
    text_n = np.concatenate([counts for _, counts in parts])
    unknown = sum(int((ids == tokenizer.unknown_id).sum()) for ids in documents)
    return EvaluationText(
        name=name,
        blocks_nL=blocks_nL,
        text_n=text_n,
        block_ids_n=np.arange(len(blocks_nL)),
        source_blocks=len(blocks_nL),
        dropped_tokens=tokens - int(text_n.sum()),
        characters_per_token=characters / tokens,
        bytes_per_token=utf8_bytes / tokens,
        wrap=wrap,
        remainder=remainder,
        unknown_share=unknown / tokens,
        notes=+Counter({RESPELLED: respelled}),
    )


def _cut(
    stream: npt.NDArray[np.int32], length: int, eos_id: int, remainder: str
) -> tuple[IntArray, IntArray]:
    """Blocks of a stream and how much of each is text."""
    whole, rest = divmod(len(stream), length)
    if remainder == "pad" and rest:
        stream = np.append(stream, np.full(length - rest, eos_id, dtype=stream.dtype))
        counts = np.array([length] * whole + [rest])
    else:
        stream, counts = stream[: whole * length], np.full(whole, length)
    return stream.reshape(-1, length).astype(np.int64), counts.astype(np.int64)


def _documents(stream: DocumentStream, mode: str, settings: TextSettings) -> Iterator[str]:
    detokenize = DETOKENIZERS[settings.detokenizer]
    rows: Iterable[str] = _rows(stream)
    if settings.last_rows is not None:
        rows = deque(rows, maxlen=settings.last_rows)
    if mode != "joined":
        keeps_ends = settings.detokenizer in _KEEPS_LINE_ENDS
        for row in rows:
            text = row if keeps_ends else row.removesuffix("\n")
            if stream.format in ARCHIVES:
                yield "".join(map(detokenize, io.StringIO(text, newline="\n")))
            else:
                yield detokenize(text) if text.strip() else ""
        return
    pieces = []
    for row in rows:
        if stream.format != "text" and not row.endswith("\n"):
            row += "\n"
        pieces.append(detokenize(row))
    yield "".join(pieces)


def _rows(stream: DocumentStream) -> Iterator[str]:
    """Documents of a file, or lines of a text file with their ends."""
    for document in stream:
        if stream.format == "text":
            yield from io.StringIO(document.text, newline="\n")
        else:
            yield document.text
