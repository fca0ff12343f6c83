"""Packing documents into blocks.

`continuous`, as in the reference implementation: within a split the documents' ids, each followed
by EOS, form one stream, cut into blocks of L; the last incomplete block is dropped and counted.

`documents`: no document is cut that fits a block. A document with its EOS that no longer fits the
current block begins the next one, and what is left is filled with EOS, which `padding` tells from
the documents' own. A document longer than L begins a block and is cut every L tokens.
"""

import base64
import zlib
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.preparation.encoding import Encoded
from sedd_scale.preparation.shard_writer import ShardWriter
from sedd_scale.tokenizers.base import Tokenizer

PACKINGS = ("continuous", "documents")
# Documents are counted by length in powers of two: fewer than 2, 4, ... 2^HISTOGRAM_BINS tokens.
HISTOGRAM_BINS = 40
_TOTALS = ("documents", "tokens", "padding", "characters", "utf8_bytes")


class SplitPacker:
    """Cuts the stream of one split into blocks, and counts what passes.

    Args:
        codec: the tokenizer, for its EOS and unknown ids.
        writer: takes the blocks.
        block_length: L.
        packing: one of `PACKINGS`.
        state: what `save_state` gave, to resume from there.

    Attributes:
        totals: documents, tokens, padding, characters and utf8_bytes so far.
    """

    def __init__(
        self,
        codec: Tokenizer,
        writer: ShardWriter,
        block_length: int,
        *,
        packing: str = "continuous",
        state: dict[str, Any] | None = None,
    ) -> None:
        assert packing in PACKINGS
        self.writer = writer
        self.totals: Counter[str] = Counter(dict.fromkeys(_TOTALS, 0))
        self._codec = codec
        self._block_length = block_length
        self._packing = packing
        self._counts = np.zeros(codec.vocab_size, dtype=np.int64)
        self._lengths = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
        self._remainder: npt.NDArray[Any] = np.empty(0, dtype=np.int64)
        if state is not None:
            self.totals.update({name: state[name] for name in _TOTALS})
            self._counts = _unpacked(state["counts"])
            self._lengths = _unpacked(state["lengths"])
            self._remainder = _unpacked(state["remainder"])

    def save_state(self) -> dict[str, Any]:
        """All that was counted and not yet written, of plain types."""
        return {
            **self.totals,
            "counts": _packed(self._counts),
            "lengths": _packed(self._lengths),
            "remainder": _packed(self._remainder),
            "writer": self.writer.save_state(),
        }

    def add(self, batch: Encoded, chosen: npt.NDArray[np.bool_]) -> None:
        """Append the chosen documents of a batch, each with its EOS, and write whole blocks."""
        lengths = batch.lengths[chosen]
        if not lengths.size:
            return
        self.totals["documents"] += len(lengths)
        self.totals["tokens"] += int(lengths.sum()) + len(lengths)
        self.totals["characters"] += int(batch.characters[chosen].sum())
        self.totals["utf8_bytes"] += int(batch.utf8_bytes[chosen].sum())
        bins = np.minimum(np.frexp(lengths + 1.0)[1] - 1, HISTOGRAM_BINS - 1)
        self._lengths += np.bincount(bins, minlength=HISTOGRAM_BINS)
        ids = batch.ids[np.repeat(chosen, batch.lengths)]
        self._counts += np.bincount(ids, minlength=len(self._counts))
        self._counts[self._codec.eos_id] += len(lengths)
        ends = np.cumsum(lengths)
        stream = np.insert(ids, ends, self._codec.eos_id)
        if self._packing == "documents":
            stream = self._aligned(stream, ends + np.arange(1, len(ends) + 1))
        stream = np.concatenate([self._remainder.astype(ids.dtype), stream])
        whole = len(stream) - len(stream) % self._block_length
        self.writer.write(stream[:whole].reshape(-1, self._block_length))
        self._remainder = stream[whole:].copy()

    def _aligned(self, stream: npt.NDArray[Any], ends: IntArray) -> npt.NDArray[Any]:
        """The stream with EOS put in wherever a document has to wait for the next block."""
        position = len(self._remainder)
        pads: list[int] = []
        places: list[int] = []
        begin = 0
        for end in ends.tolist():
            room = -position % self._block_length
            if end - begin > room:  # it does not fit, or it begins a block anyhow: room is 0
                pads.append(room)
                places.append(begin)
                position += room
            position += end - begin
            begin = end
        self.totals["padding"] += sum(pads)
        return np.insert(
            stream, np.repeat(np.array(places, dtype=np.int64), pads), self._codec.eos_id
        )

    def finish(self, name: str) -> dict[str, Any]:
        """Complete the last shard and return the split's entry of the index.

        Raises:
            DataError: the split has not one block.
        """
        dropped = len(self._remainder)
        if self._packing == "documents" and dropped:
            pad = self._block_length - dropped
            self.totals["padding"] += pad
            last = np.append(self._remainder, np.full(pad, self._codec.eos_id))
            self.writer.write(last.reshape(1, -1))
            dropped = 0
        self.writer.close()
        if self.writer.num_blocks == 0:
            wider = "" if name == "train" else f"a larger --{name}-fraction, "
            raise DataError(
                f"the {name} split has {self.totals['tokens']} tokens, less than one block of "
                f"{self._block_length}: give more text, {wider}or a shorter --block-length"
            )
        unknown = self._codec.unknown_id
        last_bin = int(np.flatnonzero(self._lengths)[-1])
        return {
            "shards": self.writer.shards,
            "blocks": self.writer.num_blocks,
            "documents": self.totals["documents"],
            "tokens": self.totals["tokens"],
            "dropped_tokens": dropped,
            "padding_tokens": self.totals["padding"],
            "characters": self.totals["characters"],
            "utf8_bytes": self.totals["utf8_bytes"],
            "unknown_tokens": 0 if unknown is None else int(self._counts[unknown]),
            "unigram_entropy_nats": unigram_entropy(self._counts),
            # Documents of 2^i - 1 to 2^(i+1) - 2 tokens, EOS left out.
            "documents_by_length": self._lengths[: last_bin + 1].tolist(),
        }


def unigram_entropy(counts: IntArray) -> float:
    """Entropy in nats/token of the distribution with these counts, the order of tokens ignored."""
    probability = counts[counts > 0] / counts.sum()
    return float(-(probability * np.log(probability)).sum())


def _packed(numbers: npt.NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(numbers.astype("<i8").tobytes(), 1)).decode()


def _unpacked(text: str) -> IntArray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8").astype(np.int64)
