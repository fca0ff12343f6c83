"""What a number means: characters as the tokenizer spells them, unknown tokens, lines, choices."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from lm_eval.api.model import TemplateLM

from sedd_scale.__main__ import main
from sedd_scale.evaluation import DOCUMENTS
from sedd_scale.evaluation.detokenizers import DETOKENIZERS
from sedd_scale.evaluation.harness import SeddScaleLM
from sedd_scale.evaluation.text_blocks import TextSettings, read_blocks
from sedd_scale.interop.pretrained import save_pretrained
from sedd_scale.preparation.sentencepiece_training import train_sentencepiece
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.tokenizers.base import RESPELLED, Tokenizer
from sedd_scale.tokenizers.gpt2 import GPT2Tokenizer
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.data.corpus import make_texts
from tests.evaluation.enumeration import tiny_model
from tests.repository import ROOT

TEXTS = make_texts(30)
WORDS = [" ".join(text.split()) for text in TEXTS]


def trained(**options: object) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a SentencePiece model as it comes, and texts."""
    folder = tmp_path_factory.mktemp("numbers")
    tokenizer = trained()
    model = tiny_model("absorb", "loglinear", num_tokens=tokenizer.vocab_size, block_length=16)
    model.tokenizer = tokenizer
    save_pretrained(model, folder / "model", format="native")
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    (folder / "squeezed.txt").write_text(" ".join(WORDS))
    airy = ("\n\n\n".join("  ".join(text.split()) for text in TEXTS) + "\n").replace("fi", "ﬁ")
    (folder / "airy.txt").write_text(airy)
    (folder / "greek.txt").write_text("Το ποτάμι και η πέτρα. " * 100)
    return folder


def evaluated(
    work: Path, capsys: pytest.CaptureFixture[str], name: str, *words: str
) -> tuple[dict[str, Any], str, str]:
    """The JSON, the table and what stood on standard error."""
    few = ["--draws", "2", "--max-blocks", "4"]
    given = ["--checkpoint", str(work / "model"), "--data", str(work / name)]
    assert main(["eval_ppl", *given, *few, *words]) == 0
    shown = capsys.readouterr()
    table, _, line = shown.out.rstrip("\n").rpartition("\n")
    return json.loads(line), table, shown.err


def test_bits_per_character_are_of_the_text_that_is_scored(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    airy, table, _ = evaluated(work, capsys, "airy.txt")
    squeezed, quiet, _ = evaluated(work, capsys, "squeezed.txt")
    assert airy["nats_per_token"] == squeezed["nats_per_token"]
    assert airy["bits_per_char"] == squeezed["bits_per_char"]
    assert airy["bits_per_byte"] == squeezed["bits_per_byte"]
    assert airy["notes"] == {RESPELLED: 1} and f"1 {RESPELLED}" in table
    assert squeezed["notes"] == {} and "spells otherwise" not in quiet


@pytest.mark.parametrize("kind", ["sentencepiece", "text8"])
def test_preparation_counts_the_same_characters(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    counts = []
    for name in ("airy.txt", "squeezed.txt"):
        out = tmp_path / name
        words = ["--input", str(work / name), "--valid-fraction", "0", "--block-length", "16"]
        words += ["--tokenizer", kind, "--output", str(out)]
        if kind == "sentencepiece":
            words += ["--tokenizer-path", str(work / "sentencepiece.model")]
        assert main(["prepare_data", *words]) == 0
        assert ("spells otherwise" in capsys.readouterr().out) == (
            name == "airy.txt" or kind == "text8"
        )
        index = json.loads((out / "index.json").read_text())
        counts.append((index["splits"]["train"], index.get("notes", {})))
    (airy, notes), (squeezed, quiet) = counts
    assert notes[RESPELLED] == airy["documents"]
    assert kind == "text8" or quiet == {}
    spelled = sum(map(len, WORDS)) + len(WORDS) - 1
    # Cut at blank lines, what stood between two documents is gone.
    if kind == "sentencepiece":
        assert squeezed["characters"] == spelled - (squeezed["documents"] - 1)
        assert 0 <= spelled - airy["characters"] < airy["documents"]


@pytest.mark.parametrize(
    ("options", "text", "spelled"),
    [
        ({}, "  a\n\nb  ", "a b"),
        ({}, "ﬁx Ⅳ", "fix IV"),
        ({"add_dummy_prefix": False}, " a", "a"),
        ({"treat_whitespace_as_suffix": True}, "a  b ", "a b"),
        ({"remove_extra_whitespaces": False}, " a  b ", " a  b "),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "AbC", "abc"),
        ({"normalization_rule_name": "identity"}, "a  ﬁ", "a ﬁ"),
        ({}, "", ""),
        ({}, "字 a", "字 a"),
    ],
)
def test_what_a_sentencepiece_model_spells(
    options: dict[str, object], text: str, spelled: str
) -> None:
    tokenizer = trained(**options)
    assert tokenizer.normalize(text) == spelled
    if tokenizer.unknown_id not in tokenizer.encode(text):
        assert tokenizer.decode(tokenizer.encode(text)).strip() == spelled.strip()


def test_a_model_that_loses_nothing_spells_what_is_there() -> None:
    tokenizer = train_sentencepiece(TEXTS, 400)
    for text in (*TEXTS, "  a\n\n\tb  ", "ﬁ字😀", ""):
        assert tokenizer.normalize(text) == text == tokenizer.decode(tokenizer.encode(text))


def test_the_share_of_unknown_tokens_is_said(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = trained()
    ids = codec.encode((work / "greek.txt").read_text())
    share = float((ids == codec.unknown_id).sum() / (len(ids) + 1))
    report, table, error = evaluated(work, capsys, "greek.txt")
    assert share > 0.3 and report["unknown_share"] == pytest.approx(share)
    assert f"\nunknown tokens    {share:.4%}\n" in table
    assert f"warning: {share:.1%} of the tokens of {work / 'greek.txt'} are unknown" in error
    report, table, error = evaluated(work, capsys, "squeezed.txt")
    assert report["unknown_share"] < 0.01 and "unknown" not in error
    out = tmp_path / "out"
    words = ["--input", str(work / "greek.txt"), "--valid-fraction", "0", "--output", str(out)]
    words += ["--tokenizer", "sentencepiece", "--tokenizer-path", str(work / "sentencepiece.model")]
    assert main(["prepare_data", *words, "--block-length", "16"]) == 0
    shown = capsys.readouterr()
    (split,) = json.loads((out / "index.json").read_text())["splits"].values()
    share = split["unknown_tokens"] / split["tokens"]
    assert f"warning: {share:.1%} of the tokens of the train split are unknown" in shown.err
    assert f"\nunknown tokens {share:>21.4%}\n" in shown.out
    # A prepared dataset carries the count with it.
    report, _, error = evaluated(work, capsys, str(out), "--split", "train")
    assert report["unknown_share"] == pytest.approx(share) and "warning" in error


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("detokenizer", DETOKENIZERS)
def test_line_ends_change_no_number(tmp_path: Path, detokenizer: str, documents: str) -> None:
    text = (ROOT / "tests/data/wikitext-like.txt").read_text() + " \" lone ? \n \n n't $ 1 . \n"
    found = []
    for end in ("\n", "\r\n", "\r"):
        path = tmp_path / f"{len(found)}.tokens"
        path.write_bytes(text.replace("\n", end).encode())
        settings = TextSettings(detokenizer, documents, remainder="pad")
        found.append(read_blocks(path, BytesTokenizer(), 16, settings))
    for other in found[1:]:
        assert np.array_equal(other.blocks_nL, found[0].blocks_nL)
        assert other.characters_per_token == found[0].characters_per_token
    assert any("line ends" in note for note in found[1].notes)
    assert any("@-@" in note for note in found[0].notes) == (detokenizer == "none")


def test_tokenised_text_is_named_in_training_data_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--input", str(ROOT / "tests/data/wikitext-like.txt"), "--valid-fraction", "0"]
    words += ["--tokenizer", "bytes", "--block-length", "32", "--output", str(tmp_path / "out")]
    assert main(["prepare_data", *words]) == 0
    assert '1 documents with " @-@ ", as WikiText writes a hyphen' in capsys.readouterr().out


def test_a_million_spaces_are_detokenised_at_once() -> None:
    for detokenize in DETOKENIZERS.values():
        for mark in ("(", '"', "'", "[ ", "a ?"):
            assert detokenize(mark + " " * 1_000_000)


class Scored(SeddScaleLM):
    """Its encoding alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.model = type("Model", (), {"tokenizer": tokenizer})()
        self.max_length, self.start = 1000, list[int]()


class OfTheHarness(TemplateLM):
    """How the harness's own models cut a pair."""

    eot_token_id = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Any:
        return self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = generate_until = _loglikelihood_tokens


@pytest.mark.parametrize("kind", ["bytes", "text8", "gpt2", "as it comes", "loses nothing"])
def test_every_split_of_a_text_is_scored_as_the_harness_does(kind: str) -> None:
    makers = {
        "bytes": BytesTokenizer,
        "text8": Text8Tokenizer,
        "gpt2": lambda: GPT2Tokenizer.open(ROOT / "tests/data/tokenizer"),
        "as it comes": trained,
        "loses nothing": lambda: train_sentencepiece(TEXTS, 400),
    }
    tokenizer = makers[kind]()
    ours, theirs = Scored(tokenizer), OfTheHarness(tokenizer)
    text = TEXTS[0][:18] + "\n\nthe answer, 1984:  字 yes. "
    spanning = 0
    for begin in range(len(text)):
        for end in range(begin, len(text) + 1):
            context, continuation = text[:begin], text[begin:end]
            given, target = ours._encoded(context, continuation)
            whole = tokenizer.encode(context + continuation).tolist()
            assert given + target == whole
            assert target or not continuation or not whole
            if context.strip():
                expected = theirs._encode_pair(context, continuation)[1]
                assert target == expected or not expected
                spanning += bool(continuation and not expected)
    if kind == "gpt2":
        assert spanning > 10, "tokens that span the cut"


def test_a_row_that_spells_nothing_ends_no_run(work: Path) -> None:
    model = SeddScaleLM(str(work / "model"), draws=2, device="cpu")
    rows = [("a", ""), ("", ""), ("a", "  "), ("den", "ti"), ("a ", "")]
    requests = [type("Request", (), {"args": row})() for row in rows]
    found = model.loglikelihood(requests)
    assert found[0] == (0.0, True) == found[1]
    assert all(np.isfinite(nats) for nats, _ in found) and found[3][0] < 0
    assert model.loglikelihood(requests[:1]) == [(0.0, True)]
    texts = [type("Request", (), {"args": (text,)})() for text in ("", "tende")]
    empty, one = model.loglikelihood_rolling(texts)
    assert empty == 0.0 and one < 0
