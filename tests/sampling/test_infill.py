"""Prompts as tokens and fixed positions, and errors that name the line."""

import json
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.data.tokenizers import BytesTokenizer
from sedd_scale.errors import DataError
from sedd_scale.sampling.infill import (
    Infill,
    infill_from_ends,
    infill_from_text,
    infill_from_tokens,
    read_prompts,
)

BYTES = BytesTokenizer()


def spelled(infill: Infill) -> str:
    """The given text with a dot for each free position."""
    return "".join(
        chr(token) if fixed else "." for token, fixed in zip(infill.tokens_L, infill.fixed_L)
    )


@pytest.mark.parametrize(
    "text, length, expected",
    [
        ("ab[blank:3]cd", 20, "ab...cd"),
        ("[blank:1][blank:2]x", 20, "...x"),
        ("ab____", 6, "ab...."),
        ("____ab", 6, "....ab"),
        ("a[blank]b____c", 8, "a...b..c"),
        ("a[blank:2]b[blank]", 9, "a..b....."),
        ("héllo____", 8, None),
    ],
)
def test_blanks_take_their_count_or_a_share(text: str, length: int, expected: str | None) -> None:
    infill = infill_from_text(text, BYTES, length)
    if expected is not None:
        assert spelled(infill) == expected
    else:
        assert len(infill.tokens_L) == length
        assert BYTES.decode(infill.tokens_L[infill.fixed_L]) == text.removesuffix("____")


def test_another_marker_may_be_chosen() -> None:
    assert spelled(infill_from_text("a____<?>b", BYTES, 8, marker="<?>")) == "a____..b"


def test_prefix_and_suffix_surround_the_free_middle() -> None:
    assert spelled(infill_from_ends("ab", "c", BYTES, 6)) == "ab...c"
    assert spelled(infill_from_ends("", "c", BYTES, 3)) == "..c"


def test_tokens_at_positions() -> None:
    infill = infill_from_tokens([7, 5], [3, 0], 10, 5)
    assert infill.tokens_L.tolist() == [5, 0, 0, 7, 0]
    assert infill.fixed_L.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(
    "text, message",
    [
        ("no blank here", "has no blank"),
        ("a[blank:0]", "has no token"),
        ("abcdef[blank:5]", "needs 11 tokens, more than the length 10"),
        ("abcdefghij____", "needs 10 tokens and 1 blanks, more than the length 10"),
    ],
)
def test_text_that_cannot_be_filled_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        infill_from_text(text, BYTES, 10)


def write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def test_prompts_are_read_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "prompts.jsonl",
        {"id": "one", "text": "a[blank:2]", "num_samples": 3, "seed": 4},
        "\n",
        {"prefix": "ab"},
        {"tokens": [1], "positions": [2]},
    )
    prompts = read_prompts(path, tokenizer=BYTES, num_tokens=257, length=5)
    assert [prompt.id for prompt in prompts] == ["one", 3, 4]
    assert [(prompt.num_samples, prompt.seed) for prompt in prompts] == [
        (3, 4),
        (1, None),
        (1, None),
    ]
    assert [len(prompt.infill.tokens_L) for prompt in prompts] == [3, 5, 5]
    assert np.flatnonzero(prompts[2].infill.fixed_L).tolist() == [2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{\n", "is not JSON"),
        ("[1]\n", "a JSON list is no prompt"),
        ({"text": 3}, "text=3 is no text"),
        ({"text": "a____", "prefix": "b"}, "exactly one of"),
        ({"id": 1}, "exactly one of"),
        ({"txt": "a____"}, "unknown key 'txt'"),
        ({"text": "a____", "num_samples": 0}, "num_samples=0"),
        ({"text": "a____", "seed": -1}, "seed=-1"),
        ({"text": "abcdefgh____"}, "more than the length 6"),
        ({"tokens": [1, 2], "positions": [1]}, "2 tokens have 1 positions"),
        ({"tokens": [1, 2], "positions": [1, 1]}, "given twice"),
        ({"tokens": [1], "positions": [6]}, "position 6 is outside"),
        ({"tokens": [257], "positions": [0]}, "token id 257"),
        ({"tokens": ["a"], "positions": [0]}, "no list of integers"),
        ({"positions": [0]}, "no list of integers"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "prompts.jsonl", {"text": "a____"}, line)
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2.*{message}"):
        read_prompts(path, tokenizer=BYTES, num_tokens=257, length=6)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        read_prompts(path, tokenizer=BYTES, num_tokens=257, length=6)

    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        read(write(tmp_path / "empty.jsonl", "\n"))
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="offset 10 is not UTF-8"):
        read(tmp_path / "bad.jsonl")
    path = write(tmp_path / "text.jsonl", {"text": "a____"})
    with pytest.raises(DataError, match="carries no tokenizer"):
        read_prompts(path, tokenizer=None, num_tokens=257, length=6)
