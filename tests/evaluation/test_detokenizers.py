"""Detokenisers: what each rule is for, and whole texts against their running form."""

import pytest

from sedd_scale.evaluation.detokenizers import DETOKENIZERS
from tests.repository import DATA

WIKITEXT = [
    (" = Robert Boulter = \n", " = Robert Boulter =\n"),
    (" = = Career = = \n", " == Career ==\n"),
    (" = = = Early = = = \n", " === Early ===\n"),
    ("a guest @-@ starring role", "a guest-starring role"),
    ("2 @,@ 500 m , or 3 @.@ 5 %", "2,500 m, or 3.5 %"),
    ("Doctors , followed ; then : he said . What ? Yes ! So", "Doctors, followed; then: he said."
     " What? Yes! So"),
    ('landed a role as " Craig " in " Teddy \'s Story " of', 'landed a role as "Craig" in "Teddy\'s'
     ' Story" of'),
    ("the players ' union ( founded [ in ] 1900 )", "the players' union (founded [in] 1900)"),
    ("at 30 ° C , N of them", "at 30°C, 1 of them"),
]  # fmt: skip
PTB = [
    ("mr. <unk> is chairman of <unk> n.v.", "mr. ? is chairman of ? n.v."),
    ("the company 's shares do n't pay $ N million", "the company's shares don't pay $1 million"),
    ("rose # N to N N N cents", "rose #1 to 1 1 1 cents"),
    ("the traders ' view and\\/or", "the traders' view and/or"),
    ("one line \n and another", "one line\nand another"),
]
LM1B = [
    ("He said , \" We 'll see . \"", "He said, \"We'll see.\""),
    ('a " new " plan ( or two ) , at $ 5 or £ 3 .', 'a "new" plan (or two), at $5 or £3.'),
    ("Why not ? Now ! Then ?", "Why not? Now! Then?"),
    ("see http : / / example.org ; so : and / or", "see http://example.org; so: and/or"),
    ("It is [ sic ] it 's over .", "It is [sic] it's over."),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", WIKITEXT)
def test_wikitext(text: str, expected: str) -> None:
    assert DETOKENIZERS["wikitext"](text) == expected


@pytest.mark.parametrize("text, expected", PTB)
def test_ptb(text: str, expected: str) -> None:
    assert DETOKENIZERS["ptb"](text) == expected


@pytest.mark.parametrize("text, expected", LM1B)
def test_lm1b(text: str, expected: str) -> None:
    assert DETOKENIZERS["lm1b"](text) == expected


def test_lambada() -> None:
    assert DETOKENIZERS["lambada"](' “ I know , ” he said " ') == '\n" I know , " he said "'


def test_none_changes_nothing() -> None:
    text = " = a @-@ b , ' N \\/ “ \n"
    assert DETOKENIZERS["none"](text) == text


def test_an_article_in_wikitexts_layout() -> None:
    """No separator and no spaced comma is left, and no letter or digit is lost."""
    text = (DATA / "wikitext-like.txt").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    made = "".join(map(DETOKENIZERS["wikitext"], lines))
    assert " @-@ " in text and " @-@ " not in made
    assert " @,@ " in text and " @,@ " not in made
    assert text.count(" , ") > 40 and " , " not in made
    assert 'In the chapter "What the Fog Said" of her memoirs, she counts' in made
    # A quote without its pair stays in its own line: the last lines still have theirs.
    assert 'never used, known as "the Spare".' in made
    # A lone N stands for a number.
    kept = [[c for c in version if c.isalnum() and c not in "1N"] for version in (text, made)]
    assert kept[0] == kept[1]
