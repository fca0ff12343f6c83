"""Tokenised benchmark text back to running text, by the rules that published perplexities use.

WikiText, the Penn Treebank and the One Billion Word benchmark are distributed with spaces around
punctuation and other marks of a word tokeniser, LAMBADA with curly quotes. Perplexities of language
models on them are those of text with these marks taken out: the rules of WikiText are those that
GPT-2's were repeated with (Megatron-LM), the others those of SEDD (arXiv 2310.16834) and after it
MDLM. A rule does not mend everything, and some mend too much; what counts is that all do the same.

Rules are replaced in order, each everywhere in one row of the source (a line of a text file): a
quote without its pair, of which WikiText has some, would turn round all that follow it.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller

Rule = Callable[[str], str]


def _apply(rules: Sequence[Rule], text: str) -> str:
    for rule in rules:
        text = rule(text)
    return text


def _literal(*pairs: tuple[str, str]) -> list[Rule]:
    """Rules whose left sides are plain text."""
    return [methodcaller("replace", *pair) for pair in pairs]


def _patterns(*pairs: tuple[str, str]) -> list[Rule]:
    return [partial(re.compile(old).sub, new) for old, new in pairs]


def _trimmed(opening: str, closing: str, text: str) -> str:
    """White space behind an opening mark and before the next closing one taken out."""
    parts, end = [], 0
    while (begin := text.find(opening, end)) >= 0 and (close := text.find(closing, begin + 1)) >= 0:
        parts += [text[end:begin], opening, text[begin + 1 : close].strip(), closing]
        end = close + 1
    return "".join([*parts, text[end:]])


_WIKITEXT: list[Rule] = [
    *_literal(("s '", "s'")),
    # Separators within numbers and compounds.
    *_literal((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_literal(*((f" {mark} ", f"{mark} ") for mark in (":", ";", ".", "!", "?", ","))),
    *(partial(_trimmed, *pair) for pair in ("()", "[]", "{}", '""', "''")),
    # Headings, degrees, ends of lines, numbers that were replaced, possessives.
    *_literal(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0")),
    *_literal((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]

_PTB = [
    *_literal((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    # Of neighbouring numbers every second one would be left: they share the space between.
    *_patterns((r" N(?= )", " 1")),
    *_literal(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
]

_LM1B = [
    *_literal(("http : / / ", "http://"), ("https : / / ", "https://")),
    *_patterns((r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1.")),
    *_patterns((r" \? ", "? "), (r" \?$", "?"), (r" ! ", "! "), (r" !$", "!")),
    *_literal((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    *_patterns(
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
    ),
    *_literal(("$ ", "$"), ("\u00a3 ", "\u00a3")),
]


def _lambada(text: str) -> str:
    return "\n" + text.replace("\u201c", '"').replace("\u201d", '"').strip()


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    # Text as it is: text8 and OpenWebText, or text of one's own.
    "none": str,
    # WikiText-2 and -103: `@-@`, spaced punctuation and brackets, headings.
    "wikitext": partial(_apply, _WIKITEXT),
    # The Penn Treebank: contractions, `N` for numbers, `<unk>` for rare words.
    "ptb": partial(_apply, _PTB),
    # The One Billion Word benchmark: spaced punctuation, quotes, brackets and currency.
    "lm1b": partial(_apply, _LM1B),
    # Straight double quotes, and a line break before the passage.
    "lambada": _lambada,
}
