"""Text to blocks of tokens, with every choice that moves a perplexity named.

Rows (lines of a text file, of a .jsonl, of a table) are detokenised one by one and become
documents; each document's ids are followed by EOS. Documents are wrapped into one stream that is
cut into blocks of L, or each begins a block of its own; what fills no block is dropped or padded.
Padding is EOS, has no noise and no part in the numbers.
"""

import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.evaluation.detokenizers import DETOKENIZERS
from sedd_scale.preparation.documents import DocumentStream
from sedd_scale.tokenizers.base import Tokenizer

_TABLES = (".jsonl", ".parquet")
# WikiText's rows keep the end of their line in every edition of it; those of other sources do not.
_KEEPS_LINE_ENDS = ("wikitext",)


@dataclass(frozen=True)
class TextSettings:
    """How text becomes blocks.

    Attributes:
        detokenizer: of `DETOKENIZERS`, for each row.
        documents: of `DOCUMENTS`; "joined": all rows are one document; "rows": each is one, blank
            ones left out; "all-rows": blank ones too, which is how SEDD's code packed its
            benchmarks; None: rows of a .jsonl or .parquet, joined for any other file.
        wrap: documents follow each other within a block; without it each begins a block.
        remainder: what becomes of tokens that fill no block, at the end of the stream or of each
            document; "drop" or "pad"; None: drop with wrap, pad without.
        field: of a .jsonl line or column of a .parquet, the text; None: "text".
        last_rows: the number of rows, the last ones; None: all.
    """

    detokenizer: str = "none"
    documents: str | None = None
    wrap: bool = True
    remainder: str | None = None
    field: str | None = None
    last_rows: int | None = None

    def resolved(self, path: Path) -> tuple[str, str]:
        """What `documents` and `remainder` are for a file."""
        documents = self.documents or ("rows" if _is_table(path) else "joined")
        return documents, self.remainder or ("drop" if self.wrap else "pad")


@dataclass(frozen=True)
class TextBlocks:
    """All blocks of a text.

    Attributes:
        blocks_nL: token ids.
        text_n: how many of each block's first tokens are text; the rest is padding.
        tokens: of the text, EOS included.
        dropped_tokens: of these, in no block.
        characters, utf8_bytes: of the text after detokenising, as the tokenizer spells it.
    """

    blocks_nL: IntArray
    text_n: IntArray
    tokens: int
    dropped_tokens: int
    characters: int
    utf8_bytes: int


def read_blocks(
    path: Path, tokenizer: Tokenizer, block_length: int, settings: TextSettings
) -> TextBlocks:
    """The blocks of a file.

    Raises:
        DataError: it is empty, no text, not UTF-8, damaged, or has no whole block, or its name
            leaves open what it holds.
        ConfigError: a field of a file that has none.
    """
    if not _is_table(path):
        for suffix in path.suffixes:
            if suffix.lower() in (*_TABLES, ".json"):
                raise DataError(
                    f"{path} is neither called {' nor '.join(_TABLES)}, which have rows, nor text: "
                    "rename it to what it is"
                )
        if settings.field is not None:
            raise ConfigError(
                f"{path} is text and has no field {settings.field!r}: leave --field out, or give a "
                f"{' or '.join(_TABLES)} file"
            )
    documents_mode, remainder = settings.resolved(path)
    documents = (
        text
        for text in _documents(path, documents_mode, settings)
        if text.strip() or documents_mode == "all-rows"
    )
    return cut_documents(
        documents, tokenizer, block_length, wrap=settings.wrap, remainder=remainder, name=str(path)
    )


def cut_documents(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    block_length: int,
    *,
    wrap: bool = True,
    remainder: str = "drop",
    name: str,
) -> TextBlocks:
    """The blocks of documents, each followed by EOS; the arguments are those of `TextSettings`.

    Raises:
        DataError: no text, or no whole block; it calls the text `name`.
    """
    eos = np.array([tokenizer.eos_id], dtype=np.int64)
    documents: list[npt.NDArray[np.int32]] = []
    characters = utf8_bytes = 0
    for text in texts:
        spelled = tokenizer.normalize(text)
        characters += len(spelled)
        utf8_bytes += len(spelled.encode())
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
    return TextBlocks(blocks_nL, text_n, tokens, tokens - int(text_n.sum()), characters, utf8_bytes)


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


def _documents(path: Path, mode: str, settings: TextSettings) -> Iterator[str]:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: give a file with text")
    detokenize = DETOKENIZERS[settings.detokenizer]
    rows = _rows(path, settings)
    if settings.last_rows is not None:
        rows = islice(
            rows, max(0, sum(1 for _ in _rows(path, settings)) - settings.last_rows), None
        )
    if mode != "joined":
        keeps_ends = settings.detokenizer in _KEEPS_LINE_ENDS
        for row in rows:
            text = row if keeps_ends else row.removesuffix("\n")
            yield detokenize(text) if text.strip() else ""
        return
    is_table = _is_table(path)
    pieces = []
    for row in rows:
        if is_table and not row.endswith("\n"):
            row += "\n"
        pieces.append(detokenize(row))
    yield "".join(pieces)


def _rows(path: Path, settings: TextSettings) -> Iterator[str]:
    """Rows of a table, or lines of a text file with their ends."""
    if _is_table(path):
        stream = DocumentStream([str(path)], field=settings.field or "text")
        return (document.text for document in stream)
    return io.StringIO(_read_text(path), newline="\n")


def _is_table(path: Path) -> bool:
    return any(suffix in path.suffixes for suffix in _TABLES)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        elif path.suffix == ".xz":
            content = lzma.decompress(content)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is cut short or not a {path.suffix} file: replace it") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{content[error.start]:02x} at offset {error.start} is not UTF-8: "
            "convert the file to UTF-8 (for example with iconv)"
        ) from error
