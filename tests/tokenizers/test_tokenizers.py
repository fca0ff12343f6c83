"""Tokenizers: text survives, ids lie in 0..N-1, what is saved is what is loaded."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.errors import DataError
from sedd_scale.preparation.sentencepiece_training import train_sentencepiece
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.gpt2 import GPT2_EOS, GPT2Tokenizer
from sedd_scale.tokenizers.opening import load_tokenizer
from sedd_scale.tokenizers.sentencepiece import (
    BPE_CHUNK_CHARACTERS,
    SentencePieceTokenizer,
)
from tests.data.corpus import make_texts
from tests.repository import DATA

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "plain words",
    "  indented\n\tand tabbed\n\n\n  with   runs of spaces  ",
    "naïve Straße 東京 🙂 \u00a0 e\u0301 \ufeff \r\n",
    "nothing special: </s> <unk> <0x0A> <|endoftext|> <s>",
    "a\0b",
    "x" * 5000,
]


def byte_level_files() -> tuple[bytes, bytes]:
    """A GPT-2 vocabulary of the 256 byte symbols, a few merges and <|endoftext|>."""
    from tokenizers import pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("i", "n")]
    pieces += ["".join(pair) for pair in merges] + [GPT2_EOS]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    return json.dumps(vocabulary).encode(), "\n".join(lines).encode()


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "sentencepiece": train_sentencepiece(make_texts(60), 400),
        "gpt2": GPT2Tokenizer(*byte_level_files()),
        "bytes": BytesTokenizer(),
        "text8": Text8Tokenizer(),
    }


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "bytes"])
@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_text_survives(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    ids = tokenizers[kind].encode(text)
    assert tokenizers[kind].eos_id not in ids
    assert tokenizers[kind].unknown_id is None or tokenizers[kind].unknown_id not in ids
    assert tokenizers[kind].decode(ids) == text


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "bytes"])
def test_parts_decode_to_parts(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.encode("\n").size == 1
    ids = tokenizer.encode("the winter light\n  of a river").tolist()
    for cut in range(len(ids)):
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "bytes", "text8"])
def test_batches_and_files(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    texts = make_texts(20, seed=1)
    batch = tokenizer.encode_batch(texts)
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert (loaded.kind, loaded.vocab_size, loaded.eos_id, loaded.fingerprint) == (
        kind,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.fingerprint,
    )
    for text, ids in zip(texts, batch, strict=True):
        assert ids.dtype == np.int64
        assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        assert np.array_equal(ids, tokenizer.encode(text))
        assert np.array_equal(ids, loaded.encode(text))
        assert loaded.decode(ids) == tokenizer.normalize(text)


def test_fingerprints_differ(tokenizers: dict[str, Tokenizer]) -> None:
    other = train_sentencepiece(make_texts(60, seed=2), 400)
    prints = {tokenizer.fingerprint for tokenizer in [*tokenizers.values(), other]}
    assert len(prints) == 5


def test_sentencepiece_training_repeats() -> None:
    texts = make_texts(40)
    first, second = (train_sentencepiece(iter(texts), 350) for _ in range(2))
    assert first.vocab_size == 350
    assert first.files() == second.files()


def test_sizes(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["bytes"].vocab_size == 257
    assert tokenizers["bytes"].eos_id == 256
    assert tokenizers["text8"].vocab_size == 27
    assert tokenizers["gpt2"].decode([tokenizers["gpt2"].eos_id]) == GPT2_EOS


def test_text8_normalises_as_text8_was(tokenizers: dict[str, Tokenizer]) -> None:
    text8 = tokenizers["text8"]
    ids = text8.encode("  The Year 42,\n\tÉtat!  ")
    assert text8.decode(ids) == "the year four two tat"
    assert text8.decode(range(27)) == " abcdefghijklmnopqrstuvwxyz"
    assert text8.encode("!? 東京").size == 0


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "bytes", "text8"])
def test_ids_outside_are_refused(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    size = tokenizers[kind].vocab_size
    with pytest.raises(DataError, match=f"token id {size} is outside 0..{size - 1}"):
        tokenizers[kind].decode([0, size])
    with pytest.raises(DataError, match="token id -1 "):
        tokenizers[kind].decode([-1])


def test_sentencepiece_sizes_that_do_not_fit() -> None:
    texts = make_texts(5)
    with pytest.raises(DataError, match=r"--vocab-size 30000 is too large .* at most (\d+)") as hit:
        train_sentencepiece(texts, 30_000)
    largest = int(str(hit.value).split("at most ")[1].split(",")[0])
    assert train_sentencepiece(texts, largest).vocab_size == largest
    with pytest.raises(DataError, match="--vocab-size 100 leaves no room"):
        train_sentencepiece(texts, 100)
    with pytest.raises(DataError, match="--vocab-size 320 is too small for this text's characters"):
        train_sentencepiece(["".join(map(chr, range(0x4E00, 0x4F00)))], 320)


def test_changed_and_missing_files(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizers["gpt2"].save(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\nt h\n")
    with pytest.raises(DataError, match="not the ones that were saved"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(DataError, match=r"merges\.txt does not exist"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_damaged_definitions(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    model = tokenizers["sentencepiece"].files()[SentencePieceTokenizer.MODEL_FILE]
    (tmp_path / "cut.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(DataError, match=r"cut\.model is not a SentencePiece model"):
        SentencePieceTokenizer.open(tmp_path / "cut.model")
    vocabulary, merges = byte_level_files()
    (tmp_path / "gpt2-vocab.json").write_bytes(vocabulary)
    (tmp_path / "gpt2-merges.txt").write_bytes(merges + b"q z\n")
    with pytest.raises(DataError, match="line 7 of the merges does not fit"):
        GPT2Tokenizer.open(tmp_path)
    (tmp_path / "gpt2-merges.txt").write_bytes(merges)
    assert GPT2Tokenizer.open(tmp_path).fingerprint == tokenizers["gpt2"].fingerprint
    shorter = {piece: token for piece, token in json.loads(vocabulary).items() if token > 0}
    with pytest.raises(DataError, match=r"ids 0\.\.N-1"):
        GPT2Tokenizer(json.dumps(shorter).encode(), merges)


def test_a_sentencepiece_model_with_other_special_ids(tmp_path: Path) -> None:
    """As language models are published with: unknown 0, begin 1, end 2, then bytes."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_texts(60)),
        model_prefix=str(tmp_path / "foreign"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer.open(tmp_path / "foreign.model")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.unknown_id) == (500, 2, 0)
    for text in ("Straße 東京 🙂\nnew line", *make_texts(3)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("across_words", [False, True])
def test_long_texts_have_the_ids_of_the_library(across_words: bool) -> None:
    """Byte pair encoding is given a text in chunks; pieces that go on behind a space forbid it."""
    import sentencepiece

    texts = make_texts(60)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_by_whitespace=not across_words,
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = SentencePieceTokenizer(model.getvalue())
    draw = random.Random(0)
    pieces = [*texts, *HARD_TEXTS, "  ", "\n\n", " \n", "\u2581", "x" * 5000, " " * 4000]
    long_texts = [" ".join(draw.choices(pieces, k=60)) for _ in range(6)]
    assert min(map(len, long_texts)) > 2 * BPE_CHUNK_CHARACTERS
    for text in [*long_texts, "", *HARD_TEXTS]:
        assert tokenizer.encode(text).tolist() == library.encode(text)
    multi_word = any(" " in library.decode([piece]).strip() for piece in range(600))
    assert multi_word == across_words


def test_gpt2_agrees_with_an_independent_implementation() -> None:
    import tokenizers

    directory = DATA / "tokenizer"
    gpt2 = GPT2Tokenizer.open(directory)
    assert (gpt2.vocab_size, gpt2.eos_id) == (1001, 1000)
    vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    merges = [(line.split(" ")[0], line.split(" ")[1]) for line in lines if line]
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    draw = random.Random(0)
    pieces = [*make_texts(20), *HARD_TEXTS, "'ll", "  ", "\n\n", "don't", "3.14", "\u00b2\u2167"]
    for _ in range(200):
        symbols = [chr(draw.randint(1, limit)) for limit in (0x7F, 0x2FF, 0x3000, 0xD7FF) * 10]
        text = "".join(draw.sample([*pieces, *symbols], 30))
        ids = gpt2.encode(text).tolist()
        assert ids == other.encode(text).ids
        assert gpt2.decode(ids) == text
