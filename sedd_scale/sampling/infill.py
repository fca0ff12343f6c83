"""Infilling: text with blanks, token ids at positions, or a prefix and a suffix, as arrays.

A blank of k tokens is written `[blank:k]`. A blank without a number, `[blank]` or the marker
(`____` by default), takes an equal share of what the length leaves free. Without such a blank the
sample is as long as its text and numbered blanks.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sedd_scale.arrays import BoolArray, IntArray
from sedd_scale.errors import DataError
from sedd_scale.tokenizers.base import Tokenizer

DEFAULT_MARKER = "____"
KINDS = (("text",), ("prefix", "suffix"), ("tokens", "positions"))


class Given(NamedTuple):
    """What is given of one sequence: all that its sample is conditioned on.

    Attributes:
        tokens_L: int64 ids; 0 where nothing is given.
        fixed_L: which positions are given.
    """

    tokens_L: IntArray
    fixed_L: BoolArray

    @property
    def num_free(self) -> int:
        """Positions to be drawn."""
        return len(self.fixed_L) - int(self.fixed_L.sum())

    def digest(self) -> str:
        """SHA-256 (hex) of everything in it."""
        content = self.tokens_L.astype("<i8").tobytes() + self.fixed_L.tobytes()
        return hashlib.sha256(content).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a sample's record says of it: the given positions as ranges [start, end)."""
        edges = np.flatnonzero(np.diff(self.fixed_L.astype(np.int8), prepend=0, append=0))
        return {"given": edges.reshape(-1, 2).tolist()}


def unconditional(length: int) -> Given:
    """Nothing given of `length` positions."""
    return Given(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.bool_))


def kind_of(names: Collection[str]) -> tuple[str, ...]:
    """The one of `KINDS` that the names belong to.

    Raises:
        DataError: they belong to none, or to several.
    """
    kinds = [kind for kind in KINDS if any(name in names for name in kind)]
    if len(kinds) != 1:
        raise DataError("give exactly one of text, prefix/suffix, or tokens with positions")
    return kinds[0]


def given_of(
    values: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    length: int,
    marker: str = DEFAULT_MARKER,
) -> Given:
    """What is given by the values of one of `KINDS`, as tokens and fixed positions.

    Args:
        tokenizer: of the model; None leaves only tokens with positions.
        num_tokens: N.
        length: L, the most tokens.
        marker: of a blank without a number.

    Raises:
        DataError: none or several of `KINDS`, or what cannot be used of one.
    """
    kind = kind_of(values)
    if "tokens" in kind:
        if any(values.get(name) is None for name in kind):
            raise DataError("tokens and positions go together: give both")
        return infill_from_tokens(values["tokens"], values["positions"], num_tokens, length)
    if tokenizer is None:
        raise DataError(
            "the checkpoint carries no tokenizer to read text with: give the one that the model "
            "was trained with, or tokens with positions"
        )
    if "text" in kind:
        return infill_from_text(values["text"], tokenizer, length, marker=marker)
    prefix, suffix = (values.get(name, "") for name in kind)
    return infill_from_ends(prefix, suffix, tokenizer, length)


def infill_from_text(
    text: str, tokenizer: Tokenizer, length: int, *, marker: str = DEFAULT_MARKER
) -> Given:
    """Text with blanks as tokens and fixed positions; at most `length` of them.

    Raises:
        DataError: no blank, an empty one, more tokens than `length`, or text that the tokenizer
            does not spell letter for letter.
    """
    if not marker:
        raise DataError("the marker of a blank is empty: give one such as ____")
    pattern = re.compile(r"\[blank(?::(\d+))?\]|" + re.escape(marker))
    pieces: list[IntArray | int | None] = []
    end = 0
    for match in pattern.finditer(text):
        pieces.append(tokenizer.encode_part(text[end : match.start()], begins=end == 0))
        size = match[1]
        if size is not None and int(size) == 0:
            raise DataError(f"the blank {match[0]!r} has no token: give it at least 1")
        pieces.append(None if size is None else int(size))
        end = match.end()
    if not pieces:
        raise DataError(
            f"the text has no blank: write [blank:8] for 8 tokens, or {marker} for what the length "
            "leaves free"
        )
    pieces.append(tokenizer.encode_part(text[end:], begins=False))
    return _joined(pieces, length)


def infill_from_ends(prefix: str, suffix: str, tokenizer: Tokenizer, length: int) -> Given:
    """A prefix and a suffix (either may be empty) with all of the middle free.

    Raises:
        DataError: they leave no free token, or are not spelled letter for letter.
    """
    ends = [
        tokenizer.encode_part(text, begins=begins)
        for text, begins in ((prefix, True), (suffix, False))
    ]
    return _joined([ends[0], None, ends[1]], length)


def infill_from_tokens(
    tokens: Sequence[int], positions: Sequence[int], num_tokens: int, length: int
) -> Given:
    """Token ids at positions (from 0) of a sequence of `length`.

    Raises:
        DataError: an id or a position out of range, given twice, or unequal counts.
    """
    if len(tokens) != len(positions):
        raise DataError(f"{len(tokens)} tokens have {len(positions)} positions: give one each")
    if len(set(positions)) != len(positions):
        raise DataError("a position is given twice: name each once")
    for position in positions:
        if not 0 <= position < length:
            raise DataError(f"position {position} is outside 0..{length - 1}: raise length")
    for token in tokens:
        if not 0 <= token < num_tokens:
            raise DataError(f"token id {token} is outside 0..{num_tokens - 1} of this model")
    infill = unconditional(length)
    infill.tokens_L[list(positions)] = tokens
    infill.fixed_L[list(positions)] = True
    return infill


def check_prefix(fixed_L: BoolArray) -> None:
    """Raise DataError where a position is given, true, after one that is not."""
    first = int(np.argmin(np.append(fixed_L, False)))
    if fixed_L[first:].any():
        given = first + int(np.argmax(fixed_L[first:]))
        raise DataError(
            f"position {given} is given after position {first}, which is free: an autoregressive "
            "model draws from left to right; give a prefix alone"
        )


def _joined(pieces: Sequence[IntArray | int | None], length: int) -> Given:
    """Given ids, blanks of known size and blanks that share the rest, side by side."""
    counted = sum(
        piece if isinstance(piece, int) else len(piece) for piece in pieces if piece is not None
    )
    num_shares = sum(piece is None for piece in pieces)
    if counted + num_shares > length:
        needed = f"{counted} tokens" + (f" and {num_shares} blanks" if num_shares else "")
        raise DataError(
            f"the prompt needs {needed}, more than the length {length}: shorten it or raise length"
        )
    shares = iter(_shares(length - counted, num_shares))
    tokens: list[IntArray] = []
    fixed: list[BoolArray] = []
    for piece in pieces:
        if piece is None:
            piece = next(shares)
        if isinstance(piece, int):
            tokens.append(np.zeros(piece, dtype=np.int64))
            fixed.append(np.zeros(piece, dtype=np.bool_))
        else:
            tokens.append(piece)
            fixed.append(np.ones(len(piece), dtype=np.bool_))
    return Given(np.concatenate(tokens), np.concatenate(fixed))


def _shares(total: int, count: int) -> list[int]:
    """`total` in `count` nearly equal parts, the larger ones first."""
    return [total // count + (index < total % count) for index in range(count)] if count else []
