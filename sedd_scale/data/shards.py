"""Datasets of token blocks: random access to the shards that an index describes.

A dataset is a directory, here or behind a URL: `SPLIT-000000.tar`, ... (see tar_blocks),
`tokenizer/`, and `index.json`, written last.
"""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.data.cache import ChecksumError, FileCache, read_whole
from sedd_scale.data.remote_sources import Source, is_remote, open_source
from sedd_scale.data.tar_blocks import DATA_OFFSET, RecordFormat, token_dtype
from sedd_scale.errors import DataError
from sedd_scale.files.atomic import write_atomically
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY, TOKENIZER_FILE, Tokenizer
from sedd_scale.tokenizers.opening import load_tokenizer

INDEX_FILE = "index.json"
FORMAT_NAME = "sedd_scale tokens"
FORMAT_VERSION = 2

MAX_OPEN_SHARDS = 64
HASH_READ_BYTES = 1 << 20


class BadShardError(DataError):
    """A shard that does not hold what the index says.

    Attributes:
        fingerprint: of the dataset.
        shard: number of the shard within its split.
    """

    def __init__(self, message: str, *, fingerprint: str, shard: int) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint
        self.shard = shard


def write_index(directory: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write index.json, the file that makes a directory a dataset; returns what it holds.

    Adds the format, where block i of a shard stands (its ids begin at byte data_offset + i *
    stride), the tokenizer's files, and `fingerprint`, the SHA-256 of everything else but notes on
    the text it was made of.
    """
    dtype = token_dtype(content["vocab_size"])
    files = {}
    for path in sorted((directory / TOKENIZER_DIRECTORY).glob("*")):
        data = path.read_bytes()
        files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    index = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "dtype": dtype.str,
        "data_offset": DATA_OFFSET,
        "stride": RecordFormat(content["block_length"], dtype).stride,
        "tokenizer_files": files,
        **content,
    }
    index["fingerprint"] = _fingerprint(index)
    write_atomically(directory / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())
    return index


def _fingerprint(index: dict[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key not in ("fingerprint", "notes")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def has_index(location: str | os.PathLike[str]) -> bool:
    """Whether a location may be a dataset: a directory with an index, or a remote location."""
    return is_remote(str(location)) or (Path(location) / INDEX_FILE).is_file()


class Dataset:
    """A prepared dataset, opened by its index.

    Args:
        location: a directory, a URL, or `pipe:` and a command (see remote_sources).
        cache: where files of a remote dataset are kept; needed for one.

    Attributes:
        path: the directory; of a remote dataset, the local one with its index and tokenizer.
        location: what errors call the dataset.
        index: the content of index.json.
        block_length: L, tokens per block.
        vocab_size: N, the tokenizer's number of real tokens.
        eos_id: the id after every document.
        fingerprint: SHA-256 of the index, which holds the SHA-256 of every shard.

    Raises:
        DataError: there is no index, or it is damaged or of another version.
    """

    def __init__(self, location: str | os.PathLike[str], *, cache: FileCache | None = None) -> None:
        self.location = str(location)
        self._source: Source | None = None
        self._cache = cache
        if is_remote(self.location):
            assert cache is not None, "a remote dataset needs a cache"
            self._source = open_source(self.location)
            self.location = self._source.location
            content = read_whole(self._source, INDEX_FILE, first_pause=cache.first_pause)
        else:
            self.path = Path(location)
            index_path = self.path / INDEX_FILE
            if not index_path.is_file():
                raise DataError(
                    f"{self.path} holds no {INDEX_FILE}: prepare a dataset there with "
                    "sedd-scale prepare_data, or name another directory"
                )
            content = index_path.read_bytes()
        self.index = _parse_index(content, self.describe(INDEX_FILE))
        self.block_length: int = self.index["block_length"]
        self.vocab_size: int = self.index["vocab_size"]
        self.eos_id: int = self.index["eos_id"]
        self.fingerprint: str = self.index["fingerprint"]
        if self._source is not None:
            assert cache is not None
            self.path = cache.directory / "datasets" / self.fingerprint
            self._fetch_tokenizer()
            write_atomically(self.path / INDEX_FILE, content)

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Split name -> its entry in the index: shards, blocks, documents, tokens and so on."""
        splits: dict[str, dict[str, Any]] = self.index["splits"]
        return splits

    @property
    def is_remote(self) -> bool:
        """Whether shards come from elsewhere, through the cache."""
        return self._source is not None

    def reader(self, split: str, *, check_sizes: bool = True) -> "BlockReader":
        """A reader of one split's blocks; arguments as `BlockReader`."""
        return BlockReader(self, split, check_sizes=check_sizes)

    def describe(self, name: str) -> str:
        """What errors call one of the dataset's files."""
        return self._source.describe(name) if self._source is not None else str(self.path / name)

    def open_file(self, entry: dict[str, Any]) -> BinaryIO:
        """A shard, open for reading; a remote one is downloaded first, and then has its SHA-256.

        Raises:
            DataError: it is missing, has another size than the index says, or cannot be read.
            ChecksumError: its source gives other bytes.
        """
        if self._source is not None:
            assert self._cache is not None
            return self._cache.open(
                self._source, entry["name"], sha256=entry["sha256"], size=entry["bytes"]
            )
        self.check_size(entry)
        return open(self.path / entry["name"], "rb", buffering=0)

    def check_size(self, entry: dict[str, Any]) -> None:
        """Whether a local shard is there and has its size; DataError if not."""
        path = self.path / entry["name"]
        if not path.is_file():
            raise DataError(f"shard {path} is missing: restore it or prepare the data again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            how = "is cut short" if size < entry["bytes"] else "has grown"
            raise DataError(
                f"shard {path} {how}: has {size} bytes, index says {entry['bytes']}; prepare it "
                "again"
            )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            DataError: it is missing, or is not the one the index names.
        """
        tokenizer = load_tokenizer(self.path / TOKENIZER_DIRECTORY)
        if tokenizer.fingerprint != self.index["tokenizer"]["fingerprint"]:
            raise DataError(
                f"{self.path / TOKENIZER_DIRECTORY} is not the tokenizer of this dataset: restore "
                "it or prepare the data again"
            )
        return tokenizer

    def verify(self) -> int:
        """Compare every shard with its SHA-256; returns the number of bytes read.

        Raises:
            DataError: a shard is missing, has another size, or other bytes.
        """
        total = 0
        for split in self.splits:
            for shard in self.reader(split).shards:
                digest = hashlib.sha256()
                with self.open_file(shard) as stream:
                    while content := stream.read(HASH_READ_BYTES):
                        digest.update(content)
                        total += len(content)
                if digest.hexdigest() != shard["sha256"]:
                    raise DataError(
                        f"shard {self.describe(shard['name'])} is damaged (its SHA-256 differs "
                        "from the index): prepare it again"
                    )
        return total

    def _fetch_tokenizer(self) -> None:
        """Put the tokenizer of a remote dataset beside its index."""
        assert self._source is not None and self._cache is not None
        target = self.path / TOKENIZER_DIRECTORY
        target.mkdir(parents=True, exist_ok=True)
        # The file that makes a directory a tokenizer comes last.
        names = sorted(self.index["tokenizer_files"], key=lambda name: name == TOKENIZER_FILE)
        for name in names:
            if (target / name).exists():
                continue
            entry = self.index["tokenizer_files"][name]
            whole_name = f"{TOKENIZER_DIRECTORY}/{name}"
            with self._cache.open(
                self._source, whole_name, sha256=entry["sha256"], size=entry["bytes"]
            ) as stream:
                write_atomically(target / name, stream.read())


def _parse_index(content: bytes, where: str) -> dict[str, Any]:
    try:
        index = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}): prepare the data again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
        raise DataError(f"{where} is not a dataset of this program: name another directory")
    if index["version"] != FORMAT_VERSION:
        raise DataError(
            f"{where} has version {index['version']}, this program reads version "
            f"{FORMAT_VERSION}: prepare the data again"
        )
    if index.get("fingerprint") != _fingerprint(index):
        raise DataError(
            f"{where} was changed after it was written (its fingerprint does not fit): "
            "prepare the data again"
        )
    return index


class BlockReader:
    """Random access to the blocks of one split, by reads at computed offsets.

    Every block is checked as it is read: its tar header, its array header, its CRC-32. At most
    MAX_OPEN_SHARDS files are open at once; threads may share a reader.

    Args:
        check_sizes: refuse a local shard of another size at once, and not when it is read.

    Attributes:
        block_length: L, tokens per block.
        vocab_size: N; every id read is below it.
        eos_id: the id after every document.
        shards: the split's entries in the index.

    Raises:
        DataError: the dataset has no such split, or a local shard is missing or has another size
            than the index says (`check_sizes`).
    """

    def __init__(self, dataset: Dataset, split: str, *, check_sizes: bool = True) -> None:
        if split not in dataset.splits:
            raise DataError(
                f"{dataset.location} has no split {split!r}, only {', '.join(dataset.splits)}: "
                f"prepare it with --{split}-fraction above 0"
            )
        self.dataset = dataset
        self.split = split
        self.block_length = dataset.block_length
        self.vocab_size = dataset.vocab_size
        self.eos_id = dataset.eos_id
        self.shards: list[dict[str, Any]] = dataset.splits[split]["shards"]
        self.blocks_of_shard = np.array([shard["blocks"] for shard in self.shards], dtype=np.int64)
        self._format = RecordFormat(self.block_length, np.dtype(dataset.index["dtype"]))
        self._ends = np.cumsum(self.blocks_of_shard)
        self._begins = self._ends - self.blocks_of_shard
        # What is dropped is closed once no thread reads from it.
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(self._opened)
        if check_sizes and not dataset.is_remote:
            for shard in self.shards:
                dataset.check_size(shard)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def shard_of_block(self, block_ids: npt.ArrayLike) -> IntArray:
        """The number of the shard that holds each block."""
        return np.searchsorted(self._ends, np.asarray(block_ids), side="right")

    def read(self, block_ids: npt.ArrayLike) -> IntArray:
        """The blocks of these numbers, in the order asked for; int64 [n, L].

        Raises:
            BadShardError: a shard is missing, cut short, or holds something else at a block.
            DataError: a remote shard cannot be read.
        """
        wanted = np.asarray(block_ids, dtype=np.int64)
        assert wanted.ndim == 1, "block_ids is one-dimensional"
        assert np.all((wanted >= 0) & (wanted < len(self))), "block_ids lie in 0..len-1"
        records = np.empty((len(wanted), self._format.stride), dtype=np.uint8)
        stride = self._format.stride
        buffer = records.data.cast("B") if records.size else memoryview(b"")
        shard_of_block = self.shard_of_block(wanted)
        places = (wanted - self._begins[shard_of_block]).tolist()
        for row, (block, shard) in enumerate(zip(wanted.tolist(), shard_of_block.tolist())):
            offset = places[row] * stride
            record = buffer[row * stride : (row + 1) * stride]
            stream = self._open(shard)
            try:
                have = os.preadv(stream.fileno(), [record], offset)
                fault = "ends" if have < len(record) else self._format.fault(record, block)
            except OSError as error:
                fault = f"cannot be read ({error.strerror})"
            if fault is not None:
                name = self.dataset.describe(self.shards[shard]["name"])
                raise self._bad(shard, f"shard {name} {fault} at byte {offset}: prepare it again")
        tokens_BL = self._format.tokens(records)
        if tokens_BL.size and (largest := int(tokens_BL.max())) >= self.vocab_size:
            raise DataError(
                f"{self.dataset.location} ({self.split}) holds id {largest}, but its vocabulary "
                f"ends at {self.vocab_size - 1}: prepare it again"
            )
        return tokens_BL.astype(np.int64)

    def fetch(self, shard: int) -> None:
        """Make sure that a shard of a remote dataset is in the cache."""
        if self.dataset.is_remote:
            self.dataset.open_file(self.shards[shard]).close()

    def _bad(self, shard: int, message: str) -> BadShardError:
        return BadShardError(message, fingerprint=self.dataset.fingerprint, shard=shard)

    def _opened(self, shard: int) -> BinaryIO:
        try:
            return self.dataset.open_file(self.shards[shard])
        except ChecksumError as error:
            raise self._bad(shard, str(error)) from error
        except DataError as error:
            if self.dataset.is_remote:
                raise
            raise self._bad(shard, str(error)) from error
