"""Infilling: text with blanks, token ids at positions, or a prefix and a suffix, as arrays.

A blank of k tokens is written `[blank:k]`. A blank without a number, `[blank]` or the marker
(`____` by default), takes an equal share of what the length leaves free. Without such a blank the
sample is as long as its text and numbered blanks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sedd_scale.data.tokenizers import Tokenizer
from sedd_scale.errors import DataError

DEFAULT_MARKER = "____"
PROMPT_KEYS = ("id", "text", "prefix", "suffix", "tokens", "positions", "num_samples", "seed")

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Infill(NamedTuple):
    """What is given of one sequence.

    Attributes:
        tokens_L: int64 ids; 0 where nothing is given.
        fixed_L: which positions are given.
    """

    tokens_L: IntArray
    fixed_L: BoolArray


class Prompt(NamedTuple):
    """One line of a prompts file."""

    id: str | int
    infill: Infill
    num_samples: int
    seed: int | None


def unconditional(length: int) -> Infill:
    """Nothing given of `length` positions."""
    return Infill(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.bool_))


def infill_from_text(
    text: str, tokenizer: Tokenizer, length: int, *, marker: str = DEFAULT_MARKER
) -> Infill:
    """Text with blanks as tokens and fixed positions; at most `length` of them.

    Raises:
        DataError: no blank, an empty one, or more tokens than `length`.
    """
    pattern = re.compile(r"\[blank(?::(\d+))?\]|" + re.escape(marker))
    pieces: list[IntArray | int | None] = []
    end = 0
    for match in pattern.finditer(text):
        pieces.append(tokenizer.encode(text[end : match.start()]))
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
    pieces.append(tokenizer.encode(text[end:]))
    return _joined(pieces, length)


def infill_from_ends(prefix: str, suffix: str, tokenizer: Tokenizer, length: int) -> Infill:
    """A prefix and a suffix (either may be empty) with all of the middle free.

    Raises:
        DataError: they leave no free token.
    """
    return _joined([tokenizer.encode(prefix), None, tokenizer.encode(suffix)], length)


def infill_from_tokens(
    tokens: Sequence[int], positions: Sequence[int], num_tokens: int, length: int
) -> Infill:
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
            raise DataError(
                f"position {position} is outside 0..{length - 1}: give a longer --length"
            )
    for token in tokens:
        if not 0 <= token < num_tokens:
            raise DataError(f"token id {token} is outside 0..{num_tokens - 1} of this model")
    infill = unconditional(length)
    infill.tokens_L[list(positions)] = tokens
    infill.fixed_L[list(positions)] = True
    return infill


def read_prompts(
    path: str | Path,
    *,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    length: int,
    marker: str = DEFAULT_MARKER,
) -> list[Prompt]:
    """The prompts of a JSONL file, one object a line; blank lines are passed over.

    A line holds `text` with blanks, or `prefix` and/or `suffix`, or `tokens` with `positions`; and
    optionally `id` (the line number by default), `num_samples` (1) and `seed`.

    Args:
        tokenizer: of the model; None where there is none, which leaves only token ids.
        num_tokens: N.
        length: L, the most tokens a sequence may have.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is malformed; it is named.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"prompts file {path} does not exist: give a JSONL file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte at offset {error.start} is not UTF-8: convert the file to UTF-8"
        ) from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{where} is not JSON ({error}): each line must be one object"
            ) from error
        try:
            prompts.append(_prompt(record, number, tokenizer, num_tokens, length, marker))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    if not prompts:
        raise DataError(f"prompts file {path} is empty: give at least one line")
    return prompts


def _prompt(
    record: Any,
    number: int,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    length: int,
    marker: str,
) -> Prompt:
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__} is no prompt: each line must be an object")
    unknown = sorted(set(record) - set(PROMPT_KEYS))
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}: the keys are {', '.join(PROMPT_KEYS)}")
    for key, kind in (("text", str), ("prefix", str), ("suffix", str)):
        if key in record and not isinstance(record[key], kind):
            raise DataError(f"{key}={record[key]!r} is no text: give a string")
    count, seed = record.get("num_samples", 1), record.get("seed")
    if type(count) is not int or count < 1:
        raise DataError(f"num_samples={count!r} is no positive integer")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise DataError(f"seed={seed!r} is no integer from 0 on")
    name = record.get("id", number)
    if not isinstance(name, (str, int)):
        raise DataError(f"id={name!r} is neither a string nor an integer")
    return Prompt(name, _infill(record, tokenizer, num_tokens, length, marker), count, seed)


def _infill(
    record: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    num_tokens: int,
    length: int,
    marker: str,
) -> Infill:
    kinds = [
        kind
        for kind, keys in (
            ("text", ("text",)),
            ("ends", ("prefix", "suffix")),
            ("tokens", ("tokens", "positions")),
        )
        if any(key in record for key in keys)
    ]
    if len(kinds) != 1:
        raise DataError("give exactly one of text, prefix/suffix, or tokens with positions")
    if kinds == ["tokens"]:
        tokens, positions = record.get("tokens"), record.get("positions")
        for key, value in (("tokens", tokens), ("positions", positions)):
            if not isinstance(value, list) or any(type(item) is not int for item in value):
                raise DataError(f"{key}={value!r} is no list of integers")
        assert tokens is not None and positions is not None
        return infill_from_tokens(tokens, positions, num_tokens, length)
    if tokenizer is None:
        raise DataError(
            "the checkpoint carries no tokenizer to read text with: give --tokenizer, or tokens "
            "with positions"
        )
    if kinds == ["text"]:
        return infill_from_text(record["text"], tokenizer, length, marker=marker)
    return infill_from_ends(record.get("prefix", ""), record.get("suffix", ""), tokenizer, length)


def _joined(pieces: Sequence[IntArray | int | None], length: int) -> Infill:
    """Given ids, blanks of known size and blanks that share the rest, side by side."""
    counted = sum(
        piece if isinstance(piece, int) else len(piece) for piece in pieces if piece is not None
    )
    num_shares = sum(piece is None for piece in pieces)
    if counted + num_shares > length:
        needed = f"{counted} tokens" + (f" and {num_shares} blanks" if num_shares else "")
        raise DataError(
            f"the prompt needs {needed}, more than the length {length}: shorten it or give a "
            "longer --length"
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
    return Infill(np.concatenate(tokens), np.concatenate(fixed))


def _shares(total: int, count: int) -> list[int]:
    """`total` in `count` nearly equal parts, the larger ones first."""
    return [total // count + (index < total % count) for index in range(count)] if count else []
