"""What is given as tokens and fixed positions."""

import pytest

from sedd_scale.errors import DataError
from sedd_scale.sampling.infill import (
    Given,
    infill_from_ends,
    infill_from_text,
    infill_from_tokens,
)
from sedd_scale.tokenizers.alphabets import BytesTokenizer

BYTES = BytesTokenizer()


def spelled(infill: Given) -> str:
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
