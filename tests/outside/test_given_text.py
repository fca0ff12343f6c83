"""Given text stands in the result letter for letter, with any tokenizer, or is refused."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import sedd_scale
from sedd_scale.errors import DataError
from sedd_scale.generation.prompts_file import prompts_of_lines, read_prompt_lines
from sedd_scale.sampling.infill import Given, infill_from_ends, infill_from_text
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.gpt2 import GPT2Tokenizer
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.evaluation.enumeration import tiny_model
from tests.repository import ROOT

TEXT = "it was an unbelievable night, x and the old man of fire was able to see (1984) all; é 字. "


def trained(**options: object) -> SentencePieceTokenizer:
    """A SentencePiece model with the library's defaults, but for the options."""
    model = io.BytesIO()
    words = TEXT.split()
    rng = np.random.default_rng(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.permutation(words)) for _ in range(200)),
        model_writer=model,
        **{"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2, **options},
    )
    return SentencePieceTokenizer(model.getvalue())


TOKENIZERS = {
    "bytes": BytesTokenizer,
    "text8": Text8Tokenizer,
    "gpt2": lambda: GPT2Tokenizer.open(ROOT / "tests/data/tokenizer"),
    "SentencePiece as it comes": trained,
    "SentencePiece that keeps spaces": lambda: trained(remove_extra_whitespaces=False),
    "SentencePiece without a space of its own": lambda: trained(add_dummy_prefix=False),
    "SentencePiece with spaces behind words": lambda: trained(treat_whitespace_as_suffix=True),
    "SentencePiece with small letters": lambda: trained(normalization_rule_name="nmt_nfkc_cf"),
    "byte pairs with bytes to fall back on": lambda: trained(
        model_type="bpe", vocab_size=310, byte_fallback=True, character_coverage=0.98
    ),
    "SentencePiece that loses nothing": lambda: trained(
        normalization_rule_name="identity", byte_fallback=True
    ),
}
BEFORE = ["un", "it was ", "", " un", "  the", "a\n", "é", "ﬁ", "Ⅳ", "▁", "</s>", "a  b", "\ufeff"]
BEHIND = ["able", " night", "", "\n  x", "s. ", "字", "é", "\u0301x", " ", "  ", "<unk>"]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def filled(given: Given, tokenizer: Tokenizer, seed: int) -> str:
    """The text where any tokens at all were drawn: lone bytes, unknown ones and EOS among them."""
    tokens_L = given.tokens_L.copy()
    free = ~given.fixed_L
    tokens_L[free] = np.random.default_rng(seed).integers(0, tokenizer.vocab_size, free.sum())
    return tokenizer.decode(tokens_L)


def test_what_is_given_stands(tokenizer: Tokenizer) -> None:
    stood = 0
    for before, behind in itertools.product(BEFORE, BEHIND):
        try:
            given = infill_from_ends(before, behind, tokenizer, 64)
        except DataError as error:
            assert "for which the tokenizer has no token" in str(error) or "spells" in str(error)
            with pytest.raises(DataError):
                infill_from_text(f"{before}[blank:2]{behind}", tokenizer, 64)
            continue
        blanks = infill_from_text(f"{before}[blank:2]{behind}[blank:1]", tokenizer, 64)
        for seed in range(5):
            text = filled(given, tokenizer, seed)
            assert text.startswith(before) and text.endswith(behind), (before, behind, text)
            text.encode()
            text = filled(blanks, tokenizer, seed)
            assert text.startswith(before) and behind in text[len(before) :], (before, behind)
        stood += 1
    assert stood >= 12


def test_the_middle_of_a_word_is_given_with_every_tokenizer(tokenizer: Tokenizer) -> None:
    for cut in range(1, len("unbelievable")):
        before, behind = "unbelievable"[:cut], "unbelievable"[cut:]
        given = infill_from_text(f"{before}[blank:2]{behind}", tokenizer, 64)
        text = filled(given, tokenizer, cut)
        assert text.startswith(before) and text.endswith(behind)
        # Nothing but what was drawn is between.
        drawn = given._replace(fixed_L=~given.fixed_L)
        assert int(drawn.fixed_L.sum()) == 2


@pytest.mark.parametrize("kind", ["gpt2", "SentencePiece as it comes"])
def test_a_beginning_has_the_ids_of_a_text(kind: str) -> None:
    codec = TOKENIZERS[kind]()
    given = infill_from_ends("the old man was able", "", codec, 64)
    assert given.tokens_L[given.fixed_L].tolist() == codec.encode("the old man was able").tolist()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x=____", "the text holds '=', for which the tokenizer has no token: leave it out"),
        ("a\n____", r"spells 'a\\n' as 'a '"),
        ("ﬁne____", "spells 'ﬁne' as 'fine'"),
        ("half \ud83d ____", "half of a surrogate pair"),
    ],
)
def test_python_and_a_file_refuse_alike(tmp_path: Path, text: str, reason: str) -> None:
    tokenizer = trained()
    model = tiny_model("absorb", "loglinear", num_tokens=tokenizer.vocab_size, block_length=24)
    model.tokenizer = tokenizer
    with pytest.raises(DataError, match=reason):
        sedd_scale.infill(model, text, steps=2)
    with pytest.raises(DataError, match=reason):
        sedd_scale.infill(model, prefix=text.removesuffix("____"), steps=2)
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": text}) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1.* (.*" + reason.partition(",")[0] + "|half)"):
        prompts_of_lines(
            read_prompt_lines(tmp_path / "p.jsonl"),
            tokenizer=tokenizer,
            num_tokens=tokenizer.vocab_size,
            length=24,
        )
    (one,) = sedd_scale.infill(model, "un[blank:2]able", steps=2, seed=1)
    assert one.text is not None and one.text.startswith("un") and one.text.endswith("able")
