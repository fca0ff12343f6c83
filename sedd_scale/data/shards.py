"""Shards of token blocks that are both webdataset tars and random-access arrays.

A dataset is a directory: `SPLIT-000000.tar`, ... , `tokenizer/`, and `index.json`, written last.
Each shard is an uncompressed ustar with one sample per block, a member `{block:09d}.npy` that holds
L ids as uint16 or uint32. All members of a dataset have one size, so block i of a shard begins at a
computed offset and reading needs no tar reader; any tar reader, webdataset's among them, reads it
too.
"""

import hashlib
import json
import os
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.data.atomic import write_atomically
from sedd_scale.data.tokenizers import Tokenizer, load_tokenizer
from sedd_scale.errors import DataError

INDEX_FILE = "index.json"
TOKENIZER_DIRECTORY = "tokenizer"
FORMAT_NAME = "sedd_scale tokens"
FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")

TAR_BLOCK = tarfile.BLOCKSIZE
NPY_HEADER_BYTES = 128
MAX_OPEN_SHARDS = 64
HASH_READ_BYTES = 1 << 20

IntArray = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The little-endian dtype that holds ids 0..N-1: uint16 up to N = 65536, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def member_name(block: int) -> str:
    """The tar member of a block, by its number within the split."""
    return f"{block:09d}.npy"


def shard_name(split: str, shard: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{shard:06d}.tar"


def _npy_header(block_length: int, dtype: np.dtype[Any]) -> bytes:
    """The header of a version 1.0 .npy file, by hand so that its size is nobody else's decision."""
    room = NPY_HEADER_BYTES - 10
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({block_length},), }}"
    padded = text.ljust(room - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + padded.encode()


class _HashingFile:
    """A file open for writing that knows the size and SHA-256 of what was written."""

    def __init__(self, path: Path) -> None:
        self.stream = open(path, "wb")  # noqa: SIM115 (closed by close)
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self.stream.write(content)

    def close(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()


class ShardWriter:
    """Writes the blocks of one split into shards of `blocks_per_shard` blocks.

    A shard grows under a `.tmp` name and is renamed when complete. Equal blocks give equal bytes.

    Args:
        directory: the dataset's directory, which exists.
        split: "train", "valid" or "test".
        block_length: L, tokens per block.
        vocab_size: N, which decides the dtype.
        blocks_per_shard: blocks in every shard but the last.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        block_length: int,
        vocab_size: int,
        blocks_per_shard: int,
    ) -> None:
        self.shards: list[dict[str, Any]] = []
        self.num_blocks = 0
        self._directory = directory
        self._split = split
        self._dtype = token_dtype(vocab_size)
        self._header = _npy_header(block_length, self._dtype)
        self._blocks_per_shard = blocks_per_shard
        self._blocks_in_shard = 0
        self._file: _HashingFile | None = None
        self._tar: Any = None

    def write(self, tokens_KL: IntArray) -> None:
        """Append K blocks of L ids."""
        for content in tokens_KL.astype(self._dtype):
            if self._file is None:
                self._begin()
            self._tar.write(
                {
                    "__key__": member_name(self.num_blocks).removesuffix(".npy"),
                    "npy": self._header + content.tobytes(),
                }
            )
            self.num_blocks += 1
            self._blocks_in_shard += 1
            if self._blocks_in_shard == self._blocks_per_shard:
                self._end()

    def close(self) -> None:
        """Complete the last shard."""
        if self._file is not None:
            self._end()

    def abandon(self) -> None:
        """Close the unfinished shard without completing it, and remove every file written."""
        if self._file is not None:
            self._file.close()
            self._temporary.unlink()
            self._file = None
        for shard in self.shards:
            (self._directory / shard["name"]).unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._directory / shard_name(self._split, len(self.shards))

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(self._path.name + ".tmp")

    def _begin(self) -> None:
        import webdataset  # imports torch, hence not at the top

        self._file = _HashingFile(self._temporary)
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, compress=False, user="", group="", mode=0o644, mtime=0
        )
        self._blocks_in_shard = 0

    def _end(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.close()
        os.replace(self._temporary, self._path)
        self.shards.append(
            {
                "name": self._path.name,
                "blocks": self._blocks_in_shard,
                "bytes": self._file.size,
                "sha256": self._file.digest.hexdigest(),
            }
        )
        self._file = None


def write_index(directory: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write index.json, the file that makes a directory a dataset; returns what it holds.

    Adds the format, the layout of a member, and `fingerprint`, the SHA-256 of everything else.
    """
    dtype = token_dtype(content["vocab_size"])
    header = _npy_header(content["block_length"], dtype)
    size = len(header) + content["block_length"] * dtype.itemsize
    index = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "dtype": dtype.str,
        "data_offset": TAR_BLOCK + len(header),
        "stride": TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK,
        **content,
    }
    index["fingerprint"] = _fingerprint(index)
    write_atomically(directory / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())
    return index


def _fingerprint(index: dict[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Dataset:
    """A prepared dataset, opened by its index.

    Attributes:
        index: the content of index.json.
        block_length: L, tokens per block.
        vocab_size: N, the tokenizer's number of real tokens.
        eos_id: the id after every document.
        fingerprint: SHA-256 of the index, which holds the SHA-256 of every shard.

    Raises:
        DataError: there is no index, or it is damaged or of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index_path = self.path / INDEX_FILE
        if not index_path.is_file():
            raise DataError(
                f"{self.path} holds no {INDEX_FILE}: prepare a dataset there with "
                "tools/prepare_data.py, or name another directory"
            )
        try:
            index = json.loads(index_path.read_bytes())
        except ValueError as error:
            raise DataError(f"{index_path} is damaged ({error}): prepare the data again") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT_NAME:
            raise DataError(f"{index_path} is no dataset of this program: name another directory")
        if index["version"] != FORMAT_VERSION:
            raise DataError(
                f"{index_path} has version {index['version']}, this program reads version "
                f"{FORMAT_VERSION}: prepare the data again"
            )
        if index.get("fingerprint") != _fingerprint(index):
            raise DataError(
                f"{index_path} was changed after it was written (its fingerprint does not fit): "
                "prepare the data again"
            )
        self.index: dict[str, Any] = index
        self.block_length: int = index["block_length"]
        self.vocab_size: int = index["vocab_size"]
        self.eos_id: int = index["eos_id"]
        self.fingerprint: str = index["fingerprint"]

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """Split name -> its entry in the index: shards, blocks, documents, tokens and so on."""
        splits: dict[str, dict[str, Any]] = self.index["splits"]
        return splits

    def reader(self, split: str) -> "BlockReader":
        """A reader of one split's blocks."""
        return BlockReader(self, split)

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
                with open(self.path / shard["name"], "rb") as stream:
                    while content := stream.read(HASH_READ_BYTES):
                        digest.update(content)
                        total += len(content)
                if digest.hexdigest() != shard["sha256"]:
                    raise DataError(
                        f"shard {self.path / shard['name']} is damaged (its SHA-256 differs from "
                        "the index): prepare it again"
                    )
        return total


class BlockReader:
    """Random access to the blocks of one split, by memory maps of its shards.

    At most MAX_OPEN_SHARDS maps are open at once; threads may share a reader.

    Attributes:
        block_length: L, tokens per block.
        vocab_size: N; every id read is below it.
        shards: the split's entries in the index.

    Raises:
        DataError: the dataset has no such split, or a shard is missing or has another size than the
            index says; when a shard is first read, also a member that is not where it should be.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        if split not in dataset.splits:
            raise DataError(
                f"{dataset.path} has no split {split!r}, only {', '.join(dataset.splits)}: prepare "
                f"it with --{split}-fraction above 0"
            )
        self.dataset = dataset
        self.split = split
        self.block_length = dataset.block_length
        self.vocab_size = dataset.vocab_size
        self.shards: list[dict[str, Any]] = dataset.splits[split]["shards"]
        self._dtype = np.dtype(dataset.index["dtype"])
        self._header = _npy_header(self.block_length, self._dtype)
        self._ends = np.cumsum([shard["blocks"] for shard in self.shards], dtype=np.int64)
        self._begins = self._ends - [shard["blocks"] for shard in self.shards]
        self._open: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()
        for shard in self.shards:
            self._check_size(shard)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, block_ids: npt.ArrayLike) -> IntArray:
        """The blocks of these numbers, in the order asked for; int64 [n, L].

        Raises:
            DataError: an id on disk is N or more.
        """
        wanted = np.asarray(block_ids, dtype=np.int64)
        assert wanted.ndim == 1, "block_ids is one-dimensional"
        assert np.all((wanted >= 0) & (wanted < len(self))), "block_ids lie in 0..len-1"
        tokens_BL = np.empty((len(wanted), self.block_length), dtype=np.int64)
        shard_of_block = np.searchsorted(self._ends, wanted, side="right")
        for shard in np.unique(shard_of_block):
            here = shard_of_block == shard
            tokens_BL[here] = self._map(int(shard))[wanted[here] - self._begins[shard]]
        if tokens_BL.size and tokens_BL.max() >= self.vocab_size:
            largest = int(tokens_BL.max())
            raise DataError(
                f"a block of {self.dataset.path} ({self.split}) holds id {largest}, "
                f"but the vocabulary ends at {self.vocab_size - 1}: a shard is damaged, prepare it "
                "again"
            )
        return tokens_BL

    def _check_size(self, shard: dict[str, Any]) -> None:
        path = self.dataset.path / shard["name"]
        if not path.is_file():
            raise DataError(f"shard {path} is missing: restore it or prepare the data again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            how = "is cut short" if size < shard["bytes"] else "has grown"
            raise DataError(
                f"shard {path} {how}: has {size} bytes, index says {shard['bytes']}; prepare it "
                "again"
            )

    def _map(self, shard: int) -> npt.NDArray[Any]:
        """The ids of a shard as a strided view [blocks, L] of its memory map."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            entry = self.shards[shard]
            self._check_size(entry)
            content = np.memmap(self.dataset.path / entry["name"], dtype=np.uint8, mode="r")
            for block in {0, entry["blocks"] - 1}:
                self._check_member(content, shard, block)
            stride = self.dataset.index["stride"]
            view: npt.NDArray[Any] = np.ndarray(
                (entry["blocks"], self.block_length),
                dtype=self._dtype,
                buffer=content,
                offset=self.dataset.index["data_offset"],
                strides=(stride, self._dtype.itemsize),
            )
            self._open[shard] = view
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return view

    def _check_member(self, content: npt.NDArray[np.uint8], shard: int, block: int) -> None:
        """Whether the tar header and the array header of a block stand where they should."""
        begin = block * self.dataset.index["stride"]
        name = member_name(int(self._begins[shard]) + block).encode()
        head = content[begin : begin + self.dataset.index["data_offset"]].tobytes()
        if head[: len(name) + 1] != name + b"\0" or head[TAR_BLOCK:] != self._header:
            raise DataError(
                f"shard {self.dataset.path / self.shards[shard]['name']} does not hold member "
                f"{name.decode()} at byte {begin}: prepare it again"
            )
