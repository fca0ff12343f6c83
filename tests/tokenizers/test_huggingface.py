"""Tokenizers of Hugging Face: the ids of the library, and special tokens that no text becomes."""

import builtins
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_scale.data.shards import Dataset
from sedd_scale.errors import DataError
from sedd_scale.preparation.prepare import prepare
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.gpt2 import GPT2Tokenizer
from sedd_scale.tokenizers.huggingface import HuggingFaceTokenizer
from sedd_scale.tokenizers.opening import load_tokenizer, open_tokenizer
from tests.data.corpus import make_texts, write_jsonl
from tests.tokenizers.hf_files import EOS, MAKERS, TEMPLATE, byte_level, unigram, write_files
from tests.tokenizers.test_tokenizers import HARD_TEXTS, byte_level_files

TRICKY = [f"a{EOS}b", EOS, f" {EOS} <|start|><unk><pad>", "<tool> x", "<0x0A>", "``quoted''"]


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("hf"), MAKERS[request.param]())


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


def library(folder: Path) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_ids_are_those_of_the_library(folder: Path, tokenizer: Tokenizer) -> None:
    other = library(folder)
    other.no_truncation()
    other.no_padding()
    assert tokenizer.vocab_size == 1 + max(other.get_vocab().values())
    assert tokenizer.eos_id == other.token_to_id(EOS)
    texts = [*make_texts(30), *HARD_TEXTS[:6], *HARD_TEXTS[7:], "<tool> x"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int64
        assert ids.tolist() == other.encode(text, add_special_tokens=False).ids


def test_no_text_becomes_a_special_token(folder: Path, tokenizer: Tokenizer) -> None:
    special = {
        number
        for number, token in library(folder).get_added_tokens_decoder().items()
        if token.special and number != tokenizer.unknown_id
    }
    assert len(special) >= 2 and tokenizer.eos_id in special
    for text in [*TRICKY, *HARD_TEXTS]:
        ids = tokenizer.encode(text)
        assert not special & {*ids.tolist()}
        if tokenizer.unknown_id not in ids:
            assert tokenizer.decode(ids) == tokenizer.normalize(text)
            assert EOS not in text or EOS in tokenizer.decode(ids)
    assert tokenizer.decode([tokenizer.eos_id]) == EOS


def test_texts_are_spelled_as_their_ids_are(tokenizer: Tokenizer) -> None:
    texts = [*make_texts(5), *HARD_TEXTS, *TRICKY, "e\u0301ﬁ"]
    ids = tokenizer.encode_batch(texts)
    assert tokenizer.spellings(texts, ids) == [tokenizer.decode(part) for part in ids]
    assert [tokenizer.normalize(text) for text in texts] == tokenizer.spellings(texts, ids)


def test_bytes_are_spelled_without_decoding(tmp_path: Path) -> None:
    for normalizer in (False, True):
        tokenizer = open_tokenizer(write_files(tmp_path, byte_level(normalizer=normalizer)))
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        assert tokenizer._spells_all == normalizer  # the other's <tool> may be normalised
        assert tokenizer.unknown_id is None


def test_files_are_kept_as_they_are(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "hf_tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    for loaded in (load_tokenizer(tmp_path), HuggingFaceTokenizer.open(tmp_path)):
        assert loaded.files() == tokenizer.files()
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("some text").tolist() == tokenizer.encode("some text").tolist()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"chat_template\.jinja does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|start|>"}')
    with pytest.raises(DataError, match="not the ones that were saved"):
        load_tokenizer(tmp_path)


def test_given_text_stands(tokenizer: Tokenizer) -> None:
    """Whatever is drawn between, and in the middle of a word."""
    stood = 0
    rng = np.random.default_rng(0)
    for before, behind in itertools.product(["un", " the", "it was "], ["able", " x", "é", "  "]):
        try:
            ends = [tokenizer.encode_part(before, begins=True).tolist()]
            ends.append(tokenizer.encode_part(behind, begins=False).tolist())
        except DataError as error:
            assert "no token" in str(error) or "spells" in str(error)
            continue
        for _ in range(5):
            drawn = rng.integers(0, tokenizer.vocab_size, 3).tolist()
            text = tokenizer.decode([*ends[0], *drawn, *ends[1]])
            assert text.startswith(before) and text.endswith(behind)
        assert tokenizer.decode([*ends[0], *ends[1]]) == before + behind
        stood += 1
    assert stood >= 4


def test_eos_of_other_files(tmp_path: Path) -> None:
    """tokenizer_config.json first; a model's configuration is kept only where it is needed."""
    made = byte_level()
    start, tool = made.token_to_id("<|start|>"), made.token_to_id("<tool>")
    plain = open_tokenizer(write_files(tmp_path, made))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": tool}))
    again = open_tokenizer(tmp_path)
    assert (again.files(), again.fingerprint) == (plain.files(), plain.fingerprint)
    write_files(tmp_path, made, eos_token={"content": "<|start|>", "lstrip": False})
    other = open_tokenizer(tmp_path)
    assert other.eos_id == start and other.fingerprint != plain.fingerprint
    write_files(tmp_path, made, eos_token=None)
    assert open_tokenizer(tmp_path).eos_id == tool
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start, tool]}))
    last = open_tokenizer(tmp_path)
    assert last.eos_id == start and "generation_config.json" in last.files()
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(DataError, match="names no EOS to separate documents with: set eos_token"):
        open_tokenizer(tmp_path)
    write_files(tmp_path, made, eos_token="<nowhere>")
    with pytest.raises(DataError, match="has no token '<nowhere>', which tokenizer_config"):
        open_tokenizer(tmp_path)
    write_files(tmp_path, made, eos_token="a")
    with pytest.raises(DataError, match=r"EOS of .* is 'a', which texts may hold: set eos_token"):
        open_tokenizer(tmp_path)


def test_eos_that_is_no_special_token(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_files(tmp_path, byte_level(), eos_token="<tool>"))
    ids = tokenizer.encode("a<tool>")
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == "a<tool>"


def test_which_files_of_a_folder_are_meant(tmp_path: Path) -> None:
    vocabulary, merges = byte_level_files()
    (tmp_path / "vocab.json").write_bytes(vocabulary)
    (tmp_path / "merges.txt").write_bytes(merges)
    assert isinstance(open_tokenizer(tmp_path), GPT2Tokenizer)
    assert isinstance(open_tokenizer(tmp_path / "vocab.json"), GPT2Tokenizer)
    write_files(tmp_path, byte_level())
    assert isinstance(open_tokenizer(tmp_path), HuggingFaceTokenizer)
    assert isinstance(open_tokenizer(tmp_path / "tokenizer.json"), HuggingFaceTokenizer)
    assert isinstance(GPT2Tokenizer.open(tmp_path), GPT2Tokenizer)


def test_damaged_files(tmp_path: Path) -> None:
    content = write_files(tmp_path, byte_level()).joinpath("tokenizer.json").read_text()
    described = json.loads(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"tokenizer\.json is not JSON"):
        HuggingFaceTokenizer.open(tmp_path)
    path.write_text(json.dumps({**described, "model": {"type": "Other"}}))
    with pytest.raises(DataError, match=r"is no tokenizer that the tokenizers library reads \("):
        HuggingFaceTokenizer.open(tmp_path)
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no hf tokenizer: give a Hugging Face tokenizer"):
        HuggingFaceTokenizer.open(tmp_path)


def test_unknown_text_is_no_eos(tmp_path: Path) -> None:
    folder = write_files(tmp_path, unigram())
    tokenizer = open_tokenizer(folder)
    assert tokenizer.unknown_id is not None and tokenizer.unknown_id in tokenizer.encode("Ω")
    write_files(tmp_path, unigram(), eos_token="<unk>")
    with pytest.raises(DataError, match="both for text that it cannot spell and behind every"):
        open_tokenizer(folder)


def test_ids_repeat_where_training_dropped_merges(tmp_path: Path) -> None:
    described = json.loads(byte_level().to_str())
    described["model"]["dropout"] = 0.5
    write_files(tmp_path, byte_level())
    plain = open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = open_tokenizer(tmp_path)
    for text in make_texts(5):
        assert np.array_equal(tokenizer.encode(text), plain.encode(text))


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, byte_level())
    own = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return own(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"needs the package tokenizers: pip install .*\[hf\]"):
        HuggingFaceTokenizer.open(tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_datasets(tmp_path: Path, processes: int) -> None:
    """Blocks are the documents, EOS behind each, whatever the documents hold."""
    folder = write_files(tmp_path / "hf", unigram())
    texts = [f"{EOS} {text}" for text in make_texts(40)]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    prepare(
        [str(source)],
        output=tmp_path / "out",
        tokenizer="hf",
        tokenizer_path=folder,
        block_length=32,
        valid_fraction=0.0,
        processes=processes,
    )
    dataset = Dataset(tmp_path / "out")
    tokenizer = dataset.load_tokenizer()
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
    reader = dataset.reader("train")
    blocks = reader.read(np.arange(len(reader))).reshape(-1)
    assert blocks.tolist() == ids[: len(blocks)] and len(ids) - len(blocks) < 32
    entry = dataset.splits["train"]
    assert entry["characters"] == sum(len(tokenizer.normalize(text)) for text in texts)
    assert ids.count(tokenizer.eos_id) == len(texts) == entry["documents"]
