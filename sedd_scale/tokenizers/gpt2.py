"""GPT-2's byte-level BPE, from its published vocabulary and merges."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.arrays import IntArray
from sedd_scale.errors import DataError
from sedd_scale.tokenizers.base import Tokenizer, read_tokenizer_file

GPT2_EOS = "<|endoftext|>"
# The pattern's library gives up within a run of a million of what it calls white space; a run of
# this many is encoded by itself, as the pattern would have cut it.
LONG_RUN = 100_000
_LONG_RUN = re.compile(
    r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]" f"{{{LONG_RUN},}}"
)
# How GPT-2 (Radford et al., 2019, section 2.2) cuts text before merging.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE from its vocabulary and merges; EOS is `<|endoftext|>`.

    The text "<|endoftext|>" inside a document is ordinary text and never becomes EOS.

    Args:
        vocabulary: the bytes of vocab.json (piece -> id).
        merges: the bytes of merges.txt.
        name: what errors call the vocabulary.

    Raises:
        DataError: a file is malformed, or the two do not belong together.
    """

    kind = "gpt2"
    about = (
        "`GPT2TokenizerFast(vocab_file=..., merges_file=...)` of transformers reads `vocab.json` "
        "and `merges.txt` there."
    )
    VOCABULARY_FILE = "vocab.json"
    MERGES_FILE = "merges.txt"
    file_names = (VOCABULARY_FILE, MERGES_FILE)
    found_in = "the directory of vocab.json and merges.txt, or vocab.json itself"

    def __init__(self, vocabulary: bytes, merges: bytes, *, name: str = VOCABULARY_FILE) -> None:
        import tiktoken

        ids_of_pieces = _parse_gpt2_vocabulary(vocabulary, name)
        pairs = _parse_gpt2_merges(merges, ids_of_pieces, name)
        symbols = _byte_symbols()
        for symbol in symbols.values():
            if symbol not in ids_of_pieces:
                raise DataError(f"{name} is not a byte-level vocabulary: it lacks {symbol!r}")
        self._files = {self.VOCABULARY_FILE: vocabulary, self.MERGES_FILE: merges}
        self.vocab_size = len(ids_of_pieces)
        self.eos_id = ids_of_pieces[GPT2_EOS]
        # Pieces in the order of merging: their ranks, which need not be their ids.
        pieces = [*symbols.values(), *(left + right for left, right in pairs)]
        if len(set(pieces)) < len(pieces):
            raise DataError(
                f"two merges of {name} make one piece, so that its order of merging is not clear: "
                "give GPT-2's merges.txt"
            )
        bytes_of = {symbol: byte for byte, symbol in symbols.items()}
        spelled = [bytes(bytes_of[symbol] for symbol in piece) for piece in pieces]
        self._id_of_rank = np.array([ids_of_pieces[piece] for piece in pieces], dtype=np.int64)
        self._bytes_of_id = dict(zip(self._id_of_rank.tolist(), spelled))
        self._bytes_of_id[self.eos_id] = GPT2_EOS.encode()
        ranks = {piece: rank for rank, piece in enumerate(spelled)}
        self._encoding, self._whole = (
            tiktoken.Encoding(
                "gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
            ).encode_to_numpy
            for pattern in (GPT2_PATTERN, r"[\s\S]++")
        )

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        return [self._id_of_rank[self._ranks(text)] for text in texts]

    def _ranks(self, text: str) -> npt.NDArray[Any]:
        parts, begin = [], 0
        for run in _LONG_RUN.finditer(text) if len(text) >= LONG_RUN else ():
            # A run's last space belongs to what follows.
            end = run.end() - (run.end() < len(text))
            parts.append(self._encoding(text[begin : run.start()], disallowed_special=()))
            parts.append(self._whole(text[run.start() : end], disallowed_special=()))
            begin = end
        parts.append(self._encoding(text[begin:], disallowed_special=()))
        return np.concatenate(parts)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes_of_id.get(token, b"") for token in ids).decode(errors="replace")

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    @classmethod
    def files_at(cls, path: Path) -> dict[str, bytes] | None:
        """Of a directory or a vocab.json; names may begin as in gpt2-vocab.json."""
        if path.is_dir():
            names = (cls.VOCABULARY_FILE, "gpt2-" + cls.VOCABULARY_FILE)
            path = next((path / name for name in names if (path / name).is_file()), path)
        if not path.name.endswith(cls.VOCABULARY_FILE):
            return None
        stem = path.name[: -len(cls.VOCABULARY_FILE)]
        return {own: read_tokenizer_file(path.with_name(stem + own)) for own in cls.file_names}


def _byte_symbols() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's files: printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in sorted(printable)} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def _parse_gpt2_vocabulary(vocabulary: bytes, name: str) -> dict[str, int]:
    try:
        parsed = json.loads(vocabulary)
    except ValueError as error:
        raise DataError(f"{name} is not JSON ({error}): give GPT-2's vocab.json") from error
    if not isinstance(parsed, dict) or sorted(
        token for token in parsed.values() if isinstance(token, int)
    ) != list(range(len(parsed))):
        raise DataError(f"{name} does not map pieces to the ids 0..N-1: give GPT-2's vocab.json")
    if GPT2_EOS not in parsed:
        raise DataError(f"{name} lacks {GPT2_EOS}, which separates documents: add it")
    return parsed


def _parse_gpt2_merges(
    merges: bytes, ids_of_pieces: dict[str, int], name: str
) -> list[tuple[str, str]]:
    try:
        lines = merges.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"the merges of {name} are not UTF-8: give GPT-2's merges.txt") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or parts[0] + parts[1] not in ids_of_pieces:
            raise DataError(
                f"line {number} of the merges does not fit {name}: {line!r}; give the merges.txt "
                "that belongs to it"
            )
        pairs.append((parts[0], parts[1]))
    return pairs
