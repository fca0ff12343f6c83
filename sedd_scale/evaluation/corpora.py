"""The text a model is measured on, as blocks of tokens with what was dropped and how long it was.

Packing is that of training: documents' ids, each document followed by EOS, form one stream that is
cut into blocks of L; the rest at its end is dropped and reported.
"""

import glob
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedd_scale.config import DataConfig
from sedd_scale.data.cache import FileCache
from sedd_scale.data.corpus import cache_directory
from sedd_scale.data.documents import DocumentStream
from sedd_scale.data.loader import spread_blocks
from sedd_scale.data.padding import counted_positions
from sedd_scale.data.shards import INDEX_FILE, Dataset
from sedd_scale.data.sources import is_remote
from sedd_scale.data.tokenizers import Tokenizer
from sedd_scale.errors import DataError

IntArray = npt.NDArray[np.int64]

FILES_OF_DATASETS = {
    "wikitext2": "wiki.test.raw of WikiText-2 raw",
    "wikitext103": "wiki.test.raw of WikiText-103 raw",
    "ptb": "ptb.test.txt of the Penn Treebank",
    "lambada": "lambada_test.jsonl (the OpenAI variant)",
    "lm1b": "the held-out shard news.en.heldout-00000-of-00050 of the One Billion Word benchmark",
    "text8": "the last 5,000,000 characters of text8",
    "openwebtext": "held-out documents of OpenWebText as JSONL",
}
_JSON_SUFFIX = ".jsonl"


@dataclass(frozen=True)
class Corpus:
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
        fingerprint: SHA-256 of the source.
    """

    name: str
    blocks_nL: IntArray
    text_n: IntArray
    block_ids_n: IntArray
    source_blocks: int
    dropped_tokens: int
    characters_per_token: float
    bytes_per_token: float
    fingerprint: str

    @property
    def block_length(self) -> int:
        """L."""
        return int(self.blocks_nL.shape[1])


def refuse_dataset_by_name(name: str) -> DataError:
    """The error that says which file stands for a named benchmark."""
    return DataError(
        f"--dataset {name}: this version does not fetch or detokenise benchmarks; give its file "
        f"with --data FILE ({FILES_OF_DATASETS[name]})"
    )


def open_corpus(
    location: str | Path,
    *,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    block_length: int | None,
    split: str = "valid",
    field: str = "text",
    max_blocks: int | None = None,
    cache_dir: Path | None = None,
) -> Corpus:
    """Blocks of a prepared dataset, or of a text or .jsonl file, plain, .gz or .xz.

    Args:
        location: of a dataset, whatever data.path may be (a directory, a URL, `pipe:` and a
            command); or a file.
        tokenizer: of the model; needed for a file, compared by fingerprint with a dataset's.
        num_tokens: N of the model.
        block_length: L for a file.
        split: of a prepared dataset.
        field: of a .jsonl line.
        max_blocks: at most so many blocks, evenly spread over the source.
        cache_dir: where files of a remote dataset are kept; None: where training keeps them.

    Raises:
        DataError: nothing there, unreadable, too short, or of another tokenizer.
    """
    if max_blocks is not None and max_blocks < 1:
        raise DataError(f"--max-blocks {max_blocks} is too few: give at least 1")
    if is_remote(str(location)):
        config = DataConfig(cache_dir=None if cache_dir is None else str(cache_dir))
        cache = FileCache(cache_directory(config), int(config.cache_gb * 1e9))
        dataset = Dataset(location, cache=cache)
        return _prepared(dataset, tokenizer, num_tokens, split, max_blocks)
    path = Path(location)
    if not path.exists():
        raise DataError(f"--data {path} does not exist: give a prepared dataset or a text file")
    if path.is_dir():
        if not (path / INDEX_FILE).is_file():
            raise DataError(
                f"--data {path} is a directory without {INDEX_FILE}: give one that "
                "tools/prepare_data.py wrote, or a text file"
            )
        return _prepared(Dataset(path), tokenizer, num_tokens, split, max_blocks)
    if tokenizer is None:
        raise DataError(
            f"the checkpoint carries no tokenizer to read {path} with: give --tokenizer, or a "
            "prepared dataset"
        )
    if block_length is None:
        raise DataError("the checkpoint does not name its block length: give --block-length")
    return _from_file(path, tokenizer, block_length, field, max_blocks)


def _prepared(
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    split: str,
    max_blocks: int | None,
) -> Corpus:
    own = dataset.index["tokenizer"]
    if tokenizer is not None and tokenizer.fingerprint != own["fingerprint"]:
        raise DataError(
            f"{dataset.location} was made with another tokenizer ({own['kind']}, "
            f"{own['fingerprint'][:12]}) than the checkpoint ({tokenizer.kind}, "
            f"{tokenizer.fingerprint[:12]}): prepare the data with the checkpoint's tokenizer"
        )
    if dataset.vocab_size != num_tokens:
        raise DataError(
            f"{dataset.location} has a vocabulary of {dataset.vocab_size} tokens and the "
            f"checkpoint one of {num_tokens}: prepare the data with the checkpoint's tokenizer"
        )
    reader = dataset.reader(split)
    entry = dataset.splits[split]
    ids_n = spread_blocks(len(reader), max_blocks or len(reader))
    blocks_nL = reader.read(ids_n)
    text_n = np.full(len(ids_n), dataset.block_length)
    if dataset.index["packing"] == "documents":
        text_n = counted_positions(blocks_nL, dataset.eos_id).sum(axis=1)
    return Corpus(
        name=f"{dataset.location} ({split})",
        blocks_nL=blocks_nL,
        text_n=text_n,
        block_ids_n=ids_n,
        source_blocks=len(reader),
        dropped_tokens=int(entry["dropped_tokens"]),
        characters_per_token=entry["characters"] / entry["tokens"],
        bytes_per_token=entry["utf8_bytes"] / entry["tokens"],
        fingerprint=dataset.fingerprint,
    )


def _from_file(
    path: Path, tokenizer: Tokenizer, block_length: int, field: str, max_blocks: int | None
) -> Corpus:
    stream: list[IntArray] = []
    eos = np.array([tokenizer.eos_id], dtype=np.int64)
    characters = utf8_bytes = 0
    for text in _documents(path, field):
        if not text.strip():
            continue
        spelled = tokenizer.normalize(text)
        characters += len(spelled)
        utf8_bytes += len(spelled.encode())
        stream += [tokenizer.encode(text), eos]
    if not stream:
        raise DataError(f"{path} holds no text: give a file with text")
    tokens = np.concatenate(stream)
    source_blocks = len(tokens) // block_length
    if source_blocks == 0:
        raise DataError(
            f"{path} has {len(tokens)} tokens, less than one block of {block_length}: give more "
            "text or a shorter --block-length"
        )
    whole = source_blocks * block_length
    ids_n = spread_blocks(source_blocks, max_blocks or source_blocks)
    return Corpus(
        name=str(path),
        blocks_nL=tokens[:whole].reshape(source_blocks, block_length)[ids_n],
        text_n=np.full(len(ids_n), block_length),
        block_ids_n=ids_n,
        source_blocks=source_blocks,
        dropped_tokens=len(tokens) - whole,
        characters_per_token=characters / len(tokens),
        bytes_per_token=utf8_bytes / len(tokens),
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _documents(path: Path, field: str) -> Iterator[str]:
    """The lines of a .jsonl, or the whole of any other file as one document."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: give a file with text")
    if _JSON_SUFFIX in path.suffixes:
        for document in DocumentStream([glob.escape(str(path))], field=field):
            yield document.text
        return
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        elif path.suffix == ".xz":
            content = lzma.decompress(content)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} is cut short or not a {path.suffix} file: replace it") from error
    try:
        yield content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte 0x{content[error.start]:02x} at offset {error.start} is not UTF-8: "
            "convert the file to UTF-8 (for example with iconv)"
        ) from error
