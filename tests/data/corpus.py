"""A small corpus for the tests of data: the same documents for the same number."""

import itertools
import json
import random
from pathlib import Path

TEXT = (
    "the of river and stone a light winter over under house reads model score noise token mask "
    "entropy diffuse letter cold naïve Straße 東京 🙂 1984 x=1;"
)
SYLLABLES = [
    "ka",
    "ro",
    "mi",
    "ten",
    "sol",
    "ba",
    "ver",
    "du",
    "lin",
    "or",
    "ges",
    "ti",
    "pa",
    "mun",
    "en",
    "fa",
]
WORDS = TEXT.split() + ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]


def make_texts(count: int, *, seed: int = 0) -> list[str]:
    """`count` different documents of 30 to 200 words on several lines."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randint(30, 200))
        lines = [" ".join(words[begin : begin + 12]) for begin in range(0, len(words), 12)]
        texts.append(f"Document {number}\n" + "\n  ".join(lines))
    return texts


def write_jsonl(path: Path, texts: list[str], *, field: str = "text") -> Path:
    """One object per line, with the text under `field`."""
    lines = [json.dumps({"title": "t", field: text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
