"""Token blocks as the bytes of an uncompressed ustar, and back, many blocks at a time.

Block i of a split is the member `{i:012d}.npy`. Its record is a tar header, an array header and L
ids, padded to whole tar blocks; all records of a dataset have one size (`stride`), so block i of a
shard begins at a computed offset and reading needs no tar reader. The header's user name, which
tar readers ignore, holds the CRC-32 of the ids: each block can be checked by itself, wherever
reading begins. Any tar reader, webdataset's among them, reads these files.
"""

import tarfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import ByteArray, IntArray

TAR_BLOCK = tarfile.BLOCKSIZE
NPY_HEADER_BYTES = 128
DATA_OFFSET = TAR_BLOCK + NPY_HEADER_BYTES
NAME_DIGITS = 12
LARGEST_BLOCK = 10**NAME_DIGITS - 1

# Fields of a ustar header (POSIX.1-1988): where the name, the checksum and the user name stand.
_CHECKSUM = slice(148, 156)
_CRC_MARK = b"crc32="
_CRC = slice(265 + len(_CRC_MARK), 265 + len(_CRC_MARK) + 8)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The little-endian dtype that holds ids 0..N-1: uint16 up to N = 65536, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def member_name(block: int) -> str:
    """The tar member of a block, by its number within the split."""
    return f"{block:0{NAME_DIGITS}d}.npy"


def npy_header(block_length: int, dtype: np.dtype[Any]) -> bytes:
    """The header of a version 1.0 .npy file, by hand so that its size is nobody else's decision."""
    room = NPY_HEADER_BYTES - 10
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({block_length},), }}"
    padded = text.ljust(room - 1) + "\n"
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + padded.encode()


class RecordFormat:
    """How the blocks of one dataset stand in its tars.

    Args:
        block_length: L, tokens per block.
        dtype: of the ids, as `token_dtype` gives it.

    Attributes:
        stride: bytes from one block's record to the next.
    """

    def __init__(self, block_length: int, dtype: np.dtype[Any]) -> None:
        self.block_length = block_length
        self.dtype = dtype
        self._data_bytes = block_length * dtype.itemsize
        size = NPY_HEADER_BYTES + self._data_bytes
        self.stride = TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
        info = tarfile.TarInfo(member_name(0))
        info.size, info.mode, info.mtime = size, 0o644, 0
        info.uname, info.gname = (_CRC_MARK + b"0" * 8).decode(), ""
        header = info.tobuf(tarfile.USTAR_FORMAT)
        self._npy_head = npy_header(block_length, dtype)
        self._head = header + self._npy_head
        # The digits of the name and of the CRC change from block to block, and the checksum does.
        plain = bytearray(header)
        plain[:NAME_DIGITS] = bytes(NAME_DIGITS)
        plain[_CRC] = bytes(8)
        plain[_CHECKSUM] = b" " * 8
        self._plain_sum = sum(plain)

    def records(self, first_block: int, tokens_KL: npt.NDArray[Any]) -> ByteArray:
        """The bytes [K, stride] of K consecutive blocks."""
        ids = np.ascontiguousarray(tokens_KL, dtype=self.dtype)
        count = len(ids)
        assert first_block + count <= LARGEST_BLOCK
        records = np.zeros((count, self.stride), dtype=np.uint8)
        records[:, :DATA_OFFSET] = np.frombuffer(self._head, dtype=np.uint8)
        data = ids.view(np.uint8).reshape(count, self._data_bytes)
        records[:, DATA_OFFSET : DATA_OFFSET + self._data_bytes] = data
        numbers = first_block + np.arange(count, dtype=np.int64)
        name = _digits(numbers, NAME_DIGITS, 10)
        crc = np.frombuffer(b"".join(b"%08x" % zlib.crc32(row) for row in ids), dtype=np.uint8)
        crc = crc.reshape(count, 8)
        records[:, :NAME_DIGITS] = name
        records[:, _CRC] = crc
        total = self._plain_sum + name.sum(1, dtype=np.int64) + crc.sum(1, dtype=np.int64)
        records[:, 148:154] = _digits(total, 6, 8)
        records[:, 154:156] = np.frombuffer(b"\0 ", dtype=np.uint8)
        return records

    def closing(self, num_blocks: int) -> bytes:
        """What ends a tar of `num_blocks` blocks: two empty tar blocks, then whole tar records."""
        size = num_blocks * self.stride + 2 * TAR_BLOCK
        return bytes(2 * TAR_BLOCK + -size % tarfile.RECORDSIZE)

    def tar_bytes(self, num_blocks: int) -> int:
        """Size of a complete tar of `num_blocks` blocks."""
        return num_blocks * self.stride + len(self.closing(num_blocks))

    def fault(self, record: memoryview, block: int) -> str | None:
        """What is wrong with the record of a block, in words, or None."""
        head = record[:DATA_OFFSET].tobytes()
        if not head.startswith(b"%012d.npy\0" % block) or not head.endswith(self._npy_head):
            return f"does not hold member {member_name(block)}"
        data = record[DATA_OFFSET : DATA_OFFSET + self._data_bytes]
        if head[_CRC] != b"%08x" % zlib.crc32(data):
            return f"holds member {member_name(block)} with other bytes than were written (CRC-32)"
        return None

    def tokens(self, records: ByteArray) -> npt.NDArray[Any]:
        """The ids [K, L] of records [K, stride], as they are on disk; a view."""
        ids: npt.NDArray[Any] = records[:, DATA_OFFSET : DATA_OFFSET + self._data_bytes]
        return ids.view(self.dtype)


def _digits(numbers: IntArray, count: int, base: int) -> ByteArray:
    """ASCII digits [K, count] of non-negative numbers, leading zeros kept."""
    powers = base ** np.arange(count - 1, -1, -1, dtype=np.int64)
    return (numbers[:, None] // powers % base + ord("0")).astype(np.uint8)
