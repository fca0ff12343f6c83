"""Packing documents into blocks: continuous concatenation, as in the reference implementation.

Within a split the documents' ids, each followed by EOS, form one stream, cut into blocks of L; the
last incomplete block is dropped and counted.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.data.shards import ShardWriter
from sedd_scale.data.tokenizers import Tokenizer
from sedd_scale.errors import DataError

IntArray = npt.NDArray[np.int64]


class SplitPacker:
    """Cuts the stream of one split into blocks, and counts what passes."""

    def __init__(self, codec: Tokenizer, writer: ShardWriter, block_length: int) -> None:
        self.documents = 0
        self.tokens = 0
        self._codec = codec
        self._writer = writer
        self._block_length = block_length
        self._remainder = np.empty(0, dtype=np.int64)
        self._added: list[IntArray] = []
        self._counts = np.zeros(codec.vocab_size, dtype=np.int64)
        self._characters = 0
        self._utf8_bytes = 0
        self._eos = np.array([codec.eos_id], dtype=np.int64)

    def add(self, text: str, ids: IntArray) -> None:
        """Append a document and its EOS."""
        spelled = self._codec.normalize(text)
        self.documents += 1
        self.tokens += len(ids) + 1
        self._characters += len(spelled)
        self._utf8_bytes += len(spelled.encode())
        self._added += [ids, self._eos]

    def flush(self) -> None:
        """Write the blocks that are complete."""
        if not self._added:
            return
        added = np.concatenate(self._added)
        self._added = []
        self._counts += np.bincount(added, minlength=len(self._counts))
        stream = np.concatenate([self._remainder, added])
        whole = len(stream) - len(stream) % self._block_length
        self._writer.write(stream[:whole].reshape(-1, self._block_length))
        self._remainder = stream[whole:].copy()

    def finish(self, name: str) -> dict[str, Any]:
        """Complete the last shard and return the split's entry of the index.

        Raises:
            DataError: the split has not one block.
        """
        self.flush()
        self._writer.close()
        if self._writer.num_blocks == 0:
            wider = "" if name == "train" else f"a larger --{name}-fraction, "
            raise DataError(
                f"the {name} split has {self.tokens} tokens, less than one block of "
                f"{self._block_length}: give more text, {wider}or a shorter --block-length"
            )
        unknown = self._codec.unknown_id
        return {
            "shards": self._writer.shards,
            "blocks": self._writer.num_blocks,
            "documents": self.documents,
            "tokens": self.tokens,
            "dropped_tokens": self.tokens - self._writer.num_blocks * self._block_length,
            "characters": self._characters,
            "utf8_bytes": self._utf8_bytes,
            "unknown_tokens": 0 if unknown is None else int(self._counts[unknown]),
            "unigram_entropy_nats": unigram_entropy(self._counts),
        }


def unigram_entropy(counts: IntArray) -> float:
    """Entropy in nats/token of the distribution with these counts, the order of tokens ignored."""
    probability = counts[counts > 0] / counts.sum()
    return float(-(probability * np.log(probability)).sum())
