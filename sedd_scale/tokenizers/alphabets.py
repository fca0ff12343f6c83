"""Tokenizers that need no files: bytes, and the 27 symbols of text8."""

import re
from collections.abc import Sequence

import numpy as np

from sedd_scale.arrays import IntArray
from sedd_scale.tokenizers.base import Tokenizer


class BytesTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255 and EOS as 256: N = 257."""

    kind = "bytes"
    about = "Ids 0 to 255 are UTF-8 bytes, 256 ends a document."
    vocab_size = 257
    eos_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token != self.eos_id).decode(errors="replace")


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELL_DIGITS = {ord(str(digit)): f" {name} " for digit, name in enumerate(_DIGITS)}
_NOT_LETTERS = re.compile(r"[^a-z]+")


class Text8Tokenizer(Tokenizer):
    """The 27 symbols of text8: space is 0, a..z are 1..26; N = 27.

    Text is normalised as Mahoney's text8 was: lower case, each digit spelled out as a word, every
    other character a space, runs of spaces one space. The space also separates documents.
    """

    kind = "text8"
    about = "Id 0 is the space, 1 to 26 are a to z."
    vocab_size = 27
    eos_id = 0
    eos_in_text = True

    _ALPHABET = " abcdefghijklmnopqrstuvwxyz"

    def normalize(self, text: str) -> str:
        return _NOT_LETTERS.sub(" ", text.lower().translate(_SPELL_DIGITS)).strip(" ")

    def encode_batch(self, texts: Sequence[str]) -> list[IntArray]:
        return [self._ids(self.normalize(text)) for text in texts]

    def _ids(self, text: str) -> IntArray:
        letters = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
        return np.where(letters == ord(" "), 0, letters - np.uint8(96)).astype(np.int64)

    def _encode_part(self, text: str, *, begins: bool) -> IntArray:
        # Spaces at its ends are given too.
        return self._ids("".join(c if c in self._ALPHABET else self.normalize(c) for c in text))

    def _decode(self, ids: list[int]) -> str:
        return "".join(self._ALPHABET[token] for token in ids)
