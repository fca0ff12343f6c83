"""A file of prompts, one JSON object per line: what is given, how often and how to draw it.

Reading has two halves: what can be checked from the file alone, before a model is opened, and what
needs the model's tokenizer and length.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.preparation.document_formats import Row, object_of
from sedd_scale.preparation.documents import open_rows
from sedd_scale.sampling import AUTOREGRESSIVE
from sedd_scale.sampling.infill import (
    DEFAULT_MARKER,
    KINDS,
    Given,
    check_prefix,
    given_of,
    kind_of,
)
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.tokenizers.base import Tokenizer

GIVEN_KEYS = tuple(key for kind in KINDS for key in kind)
SETTINGS_KEYS = tuple(key.name for key in fields(SamplerSettings))
PROMPT_KEYS = ("id", *GIVEN_KEYS, "length", "num_samples", "seed", *SETTINGS_KEYS)

OnBadPrompt = Callable[[DataError], None]


class PromptLine(NamedTuple):
    """One line of the file as read; its keys and counts are checked, its tokens are not."""

    where: str
    """`file:line`, for errors."""
    number: int
    """Line number (of a table, row number), from 1."""
    record: dict[str, Any]


class Prompt(NamedTuple):
    """What one line asks for."""

    id: str | int
    given: Given
    num_samples: int
    seed: int | None
    settings: SamplerSettings


def read_prompt_lines(path: str | Path, *, on_bad: OnBadPrompt | None = None) -> list[PromptLine]:
    """The lines of a JSONL file, blank ones passed over; nothing is tokenised yet.

    Args:
        on_bad: called with the error of each bad line, which is then skipped; None: raise it.

    Raises:
        DataError: the file is missing or holds no usable line, or (without `on_bad`) a line is
            malformed; it is named.
    """
    path = Path(path)
    lines: list[PromptLine] = []
    places: dict[str, int] = {}
    found = 0
    for row in open_rows(path):
        found += 1
        try:
            line = PromptLine(row.where, row.number, _record_of(row))
            name = line.record.setdefault("id", row.number)
            names = sample_names(name, line.record.get("num_samples", 1))
            for own in map(str, names):
                if own in places:
                    what = f"id={name!r}" if own == str(name) else f"its sample's id {own!r}"
                    raise DataError(
                        f"{row.where}: {what} is also that of line {places[own]}: give another id"
                    )
        except DataError as error:
            _bad(error, on_bad)
            continue
        places |= dict.fromkeys(map(str, names), row.number)
        lines.append(line)
    if not found:
        raise DataError(f"prompts file {path} is empty: give at least one line")
    return _some(lines, path)


def sample_names(name: str | int, count: int) -> list[str | int]:
    """What the samples of a prompt are called: as it is, or its id and a number each."""
    return [name] if count == 1 else [f"{name}-{number}" for number in range(count)]


def prompts_of_lines(
    lines: Sequence[PromptLine],
    *,
    tokenizer: Tokenizer | None,
    num_tokens: int,
    length: int,
    kind: str = "absorb",
    marker: str = DEFAULT_MARKER,
    settings: SamplerSettings | None = None,
    on_bad: OnBadPrompt | None = None,
) -> list[Prompt]:
    """The prompts of lines, in order.

    A line holds `text` with blanks, or `prefix` and/or `suffix`, or `tokens` with `positions`; and
    optionally `id` (the line number by default), `length`, `num_samples` (1), `seed`, and any of
    the options of `SamplerSettings`.

    Args:
        tokenizer: of the model; None where there is none, which leaves only token ids.
        num_tokens: N.
        length: L, the most tokens a sequence may have.
        kind: of the model, whose samplers may be asked for.
        settings: what a line's options change; the defaults when None.
        on_bad: as in `read_prompt_lines`.

    Raises:
        DataError: (without `on_bad`) a line that this model cannot answer; or no line is left.
    """
    prompts: list[Prompt] = []
    for line in lines:
        record = line.record
        limit = record.get("length", length)
        options = {key: record[key] for key in SETTINGS_KEYS if key in record}
        try:
            if limit > length:
                raise DataError(
                    f"length={limit} is more than the length {length}: give a longer --length"
                )
            own = replace(settings or SamplerSettings(), **options)
            own.check_kind(kind)
            values = {key: record[key] for key in GIVEN_KEYS if key in record}
            given = given_of(
                values, tokenizer=tokenizer, num_tokens=num_tokens, length=limit, marker=marker
            )
            if kind == AUTOREGRESSIVE:
                check_prefix(given.fixed_L)
        except (ConfigError, DataError) as error:
            _bad(DataError(f"{line.where}: {error}"), on_bad)
            continue
        count, seed = record.get("num_samples", 1), record.get("seed")
        prompts.append(Prompt(record["id"], given, count, seed, own))
    return _some(prompts, Path(lines[0].where.rpartition(":")[0]))


def _some(found: list[Any], path: Path) -> list[Any]:
    if not found:
        raise DataError(f"prompts file {path} has no line that can be used: mend at least one")
    return found


def _bad(error: DataError, on_bad: OnBadPrompt | None) -> None:
    if on_bad is None:
        raise error
    on_bad(error)


def _record_of(row: Row) -> dict[str, Any]:
    """The object of one line, its keys and counts checked."""
    record = object_of(row)
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where} holds half of a surrogate pair: mend the line") from error
    except TypeError as error:  # a column of a table
        raise DataError(f"{row.where} is no prompt ({error}): give text and numbers") from error
    try:
        _check_record(record)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    return record


def _check_record(record: dict[str, Any]) -> None:
    unknown = sorted(set(record) - set(PROMPT_KEYS))
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r}: the keys are {', '.join(PROMPT_KEYS)}")
    for key in ("text", "prefix", "suffix"):
        if key in record and not isinstance(record[key], str):
            raise DataError(f"{key}={record[key]!r} is not text: give a string")
    for key in ("num_samples", "length"):
        if key in record and (type(record[key]) is not int or record[key] < 1):
            raise DataError(f"{key}={record[key]!r} is not a positive integer")
    seed = record.get("seed")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise DataError(f"seed={seed!r} is not an integer of at least 0")
    if "id" in record and type(record["id"]) not in (str, int):
        raise DataError(f"id={record['id']!r} is neither a string nor an integer")
    kind = kind_of(record)
    if "tokens" in kind:
        for key in kind:
            value = record.get(key)
            if not isinstance(value, list) or any(type(entry) is not int for entry in value):
                raise DataError(f"{key}={value!r} is not a list of integers")
