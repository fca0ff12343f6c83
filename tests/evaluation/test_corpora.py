"""Text as blocks: packing, counts, and refusal of what does not fit the checkpoint."""

import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.evaluation.corpora import open_corpus
from sedd_scale.evaluation.text_blocks import EvaluationText, TextSettings
from sedd_scale.preparation.prepare import prepare
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.tokenizers.base import Tokenizer
from tests.data.corpus import make_texts, write_jsonl
from tests.data.file_server import serving

BYTES = BytesTokenizer()


def open_with(path: Path, tokenizer: Tokenizer | None = BYTES, **options: object) -> EvaluationText:
    settings = {"num_tokens": 257, "default_length": 16, **options}
    return open_corpus(path, tokenizer=tokenizer, **settings)  # type: ignore[arg-type]


def test_a_text_file_is_one_document_and_its_remainder_is_counted(tmp_path: Path) -> None:
    text = "Straße\n\n東京 " * 9
    plain = tmp_path / "text.raw"
    plain.write_bytes(text.encode())
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "text.txt.xz").write_bytes(lzma.compress(text.encode()))
    size = len(text.encode()) + 1
    corpora = [open_with(path) for path in (plain, *tmp_path.glob("text.txt.*"))]
    assert len(corpora) == 3
    for corpus in corpora:
        stream = np.append(np.frombuffer(text.encode(), np.uint8), 256)
        assert corpus.source_blocks == len(corpus.blocks_nL) == size // 16
        assert corpus.dropped_tokens == size % 16
        np.testing.assert_array_equal(corpus.blocks_nL.ravel(), stream[: size // 16 * 16])
        assert corpus.characters_per_token == pytest.approx(len(text) / size)
        assert corpus.bytes_per_token == pytest.approx((size - 1) / size)


def test_lines_of_jsonl_are_documents_with_eos_after_each(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "some[1].jsonl", ["ab", "  ", "cde"] * 4, field="body")
    corpus = open_with(path, block_length=7, text=TextSettings(field="body"))
    expected = [97, 98, 256, 99, 100, 101, 256]
    np.testing.assert_array_equal(corpus.blocks_nL, [expected] * 4)
    with pytest.raises(DataError, match="has no field 'text'"):
        open_with(path)


def spelled(corpus: EvaluationText) -> list[str]:
    """What the text of each block spells, EOS as |."""
    blocks = zip(corpus.blocks_nL.tolist(), corpus.text_n.tolist(), strict=True)
    return ["".join("|" if i == 256 else chr(i) for i in block[:n]) for block, n in blocks]


def test_rows_documents_and_remainders(tmp_path: Path) -> None:
    """One small text under every choice, by hand."""
    path = tmp_path / "text.txt"
    path.write_text("ab , c\n\nd\n")
    cases = {
        (): ["ab , c\n\nd\n|"],
        ("detokenizer=wikitext",): ["ab, c\n\nd\n|"],
        ("documents=rows",): ["ab , c|d|"],
        ("documents=rows", "detokenizer=wikitext"): ["ab, c\n|d\n|"],
        ("documents=all-rows",): ["ab , c||d|"],
        ("documents=rows", "wrap="): ["ab , ", "c|", "d|"],
        ("documents=rows", "wrap=", "remainder=drop"): ["ab , "],
    }
    for words, pieces in cases.items():
        given = dict(word.split("=") for word in words)
        settings = TextSettings(**{**given, "wrap": "wrap" not in given})  # type: ignore[arg-type]
        if "wrap" in given:
            corpus = open_with(path, block_length=5, text=settings)
            assert spelled(corpus) == pieces, words
            assert corpus.dropped_tokens == (len("c|d|") if "remainder" in given else 0)
            assert (corpus.blocks_nL[corpus.text_n < 5, -1] == 256).all()
            continue
        (whole,) = pieces
        padded = open_with(path, block_length=5, text=replace(settings, remainder="pad"))
        assert "".join(spelled(padded)) == whole, words
        assert padded.dropped_tokens == 0 and padded.remainder == "pad"
        dropped = open_with(path, block_length=5, text=settings)
        assert "".join(spelled(dropped)) == whole[: len(whole) // 5 * 5], words
        assert dropped.dropped_tokens == len(whole) % 5 and dropped.remainder == "drop"
        assert padded.bytes_per_token == dropped.bytes_per_token
        written = whole.replace("|", "")
        assert padded.bytes_per_token == pytest.approx(len(written) / len(whole))
    with pytest.raises(DataError, match="7 tokens in its longest document, less than one block"):
        open_with(
            path,
            block_length=9,
            text=TextSettings(documents="rows", wrap=False, remainder="drop"),
        )


def test_rows_of_tables_are_the_lines_they_were(tmp_path: Path) -> None:
    """WikiText as the hub has it, rows that keep their line's end, and as its own file."""
    import pyarrow
    from pyarrow import parquet

    lines = [" \n", " = Title = \n", " \n", ' A " quote @-@ less line \n', ' " B " . \n'] * 3
    (tmp_path / "wiki.test.raw").write_text("".join(lines))
    rows = ["" if not line.strip() else line for line in lines]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "test.parquet")
    write_jsonl(tmp_path / "test.jsonl", rows)
    for documents in ("joined", "rows", "all-rows"):
        settings = TextSettings("wikitext", documents, remainder="pad")
        corpora = [
            open_with(tmp_path / name, text=settings)
            for name in ("wiki.test.raw", "test.parquet", "test.jsonl")
        ]
        for other in corpora[1:]:
            assert np.array_equal(other.blocks_nL, corpora[0].blocks_nL), documents
            assert other.bytes_per_token == corpora[0].bytes_per_token
        text = "".join(spelled(corpora[0]))
        assert text.count("|") == {"joined": 1, "rows": 9, "all-rows": 15}[documents]
        assert ' A " quote-less line\n' in text and ' "B".\n' in text
    settings = TextSettings("wikitext", "rows", remainder="pad", last_rows=2)
    last = open_with(tmp_path / "test.jsonl", text=settings)
    assert "".join(spelled(last)) == ' A " quote-less line\n| "B".\n|'


def test_a_text8_tokenizer_counts_the_characters_it_spells(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("It's  9!" * 20)
    corpus = open_with(path, Text8Tokenizer(), num_tokens=27)
    letters = Text8Tokenizer().normalize("It's  9!" * 20)
    assert corpus.characters_per_token == pytest.approx(len(letters) / (len(letters) + 1))


def test_a_prepared_dataset_gives_its_blocks_and_counts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", make_texts(60))
    index = prepare(
        [str(source)],
        output=tmp_path / "data",
        block_length=64,
        tokenizer="bytes",
        valid_fraction=0.4,
    )
    entry = index["splits"]["valid"]
    corpus = open_with(tmp_path / "data")
    assert len(corpus.blocks_nL) == entry["blocks"] and corpus.block_length == 64
    assert corpus.dropped_tokens == entry["dropped_tokens"]
    assert corpus.bytes_per_token == pytest.approx(entry["utf8_bytes"] / entry["tokens"])
    some = open_with(tmp_path / "data", max_blocks=5)
    assert len(some.block_ids_n) == 5
    np.testing.assert_array_equal(some.blocks_nL, corpus.blocks_nL[some.block_ids_n])
    with pytest.raises(DataError, match="another tokenizer"):
        open_with(tmp_path / "data", Text8Tokenizer(), num_tokens=27)
    with pytest.raises(DataError, match="vocabulary of 257 tokens and the checkpoint one of 300"):
        open_with(tmp_path / "data", None, num_tokens=300)
    with pytest.raises(DataError, match="no split 'test'"):
        open_with(tmp_path / "data", split="test")
    with pytest.raises(ConfigError, match="prepared dataset, whose blocks are made"):
        open_with(tmp_path / "data", text=TextSettings())
    with pytest.raises(ConfigError, match="has blocks of 64 tokens, not 16"):
        open_with(tmp_path / "data", block_length=16)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_with(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match=r"directory without index\.json"):
        open_with(tmp_path)
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        open_with(path)
    path.write_text("  \n ")
    with pytest.raises(DataError, match="holds no text"):
        open_with(path)
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="byte 0xff at offset 3 is not UTF-8"):
        open_with(path)
    path.write_text("short")
    with pytest.raises(DataError, match="6 tokens, less than one block of 16"):
        open_with(path)
    with pytest.raises(ConfigError, match="is a file and has no split 'valid'"):
        open_with(path, split="valid")
    with pytest.raises(ConfigError, match="is text and has no field 'body'"):
        open_with(path, text=TextSettings(field="body"))
    for name in ("rows.json", "rows.JSONL"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(DataError, match=f"{name}:1 has no field 'text'"):
            open_with(tmp_path / name)
    with pytest.raises(DataError, match="carries no tokenizer"):
        open_with(path, None)
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(b"abcdef" * 100)[:30])
    with pytest.raises(DataError, match=r"cut short or not a \.gz file"):
        open_with(packed)
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": "x"}) + "\n{\n")
    with pytest.raises(DataError, match=r"text\.jsonl:2 is not JSON"):
        open_with(lines)


def test_every_source_the_loader_opens_is_evaluated_with_padding_told_apart(
    tmp_path: Path,
) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", make_texts(60))
    index = prepare(
        [str(source)],
        output=tmp_path / "data",
        block_length=700,
        tokenizer="bytes",
        valid_fraction=0.4,
        packing="documents",
    )
    entry = index["splits"]["valid"]
    local = open_with(tmp_path / "data")
    assert local.text_n.sum() == entry["tokens"]
    assert local.blocks_nL.size - local.text_n.sum() == entry["padding_tokens"] > 0
    command = f"pipe:cat {tmp_path / 'data'}/{{name}}"
    with serving(tmp_path / "data") as server:
        for location in (server.url, command):
            found = open_corpus(
                location,
                tokenizer=BYTES,
                num_tokens=257,
                cache_dir=tmp_path / "cache",
            )
            assert np.array_equal(found.blocks_nL, local.blocks_nL)
            assert np.array_equal(found.text_n, local.text_n)
            assert found.fingerprint == local.fingerprint
