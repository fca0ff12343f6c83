"""Packing by documents: none is cut that fits, and padding is told from text exactly."""

from pathlib import Path

import numpy as np
import pytest

from sedd_scale.data.padding import counted_positions, shorten
from sedd_scale.data.shards import Dataset
from sedd_scale.preparation.prepare import prepare
from sedd_scale.preparation.report import format_report
from tests.data.corpus import make_texts, write_jsonl


def brute_force(documents: list[list[int]], length: int, eos: int) -> tuple[list[int], list[bool]]:
    """The stream and which of it is text, one token after the other."""
    stream: list[int] = []
    counted: list[bool] = []

    def pad() -> None:
        while len(stream) % length:
            stream.append(eos)
            counted.append(False)

    for document in documents:
        if len(document) > -len(stream) % length:
            pad()
        stream += document
        counted += [True] * len(document)
    pad()
    return stream, counted


@pytest.mark.parametrize("tokenizer", ["bytes", "text8"])
@pytest.mark.parametrize("length", [64, 500, 4000])
def test_blocks_by_brute_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str, length: int
) -> None:
    monkeypatch.setattr("sedd_scale.preparation.prepare.BATCH_DOCUMENTS", 7)
    texts = make_texts(50)
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    index = prepare(
        [str(source)],
        output=tmp_path / "out",
        block_length=length,
        tokenizer=tokenizer,
        packing="documents",
        valid_fraction=0.0,
    )
    dataset = Dataset(tmp_path / "out")
    codec = dataset.load_tokenizer()
    documents = [[*codec.encode(text).tolist(), codec.eos_id] for text in texts]
    stream, counted = brute_force(documents, length, codec.eos_id)
    reader = dataset.reader("train")
    blocks = reader.read(np.arange(len(reader)))
    assert blocks.reshape(-1).tolist() == stream
    assert counted_positions(blocks, codec.eos_id).reshape(-1).tolist() == counted
    entry = index["splits"]["train"]
    assert entry["padding_tokens"] == counted.count(False)
    assert entry["tokens"] == sum(map(len, documents)) == counted.count(True)
    assert entry["dropped_tokens"] == 0
    assert f"{counted.count(False):,}" in format_report(index)
    lengths = [len(document) - 1 for document in documents]
    for row, count in enumerate(entry["documents_by_length"]):
        assert count == sum(2**row <= n + 1 < 2 ** (row + 1) for n in lengths)


def test_counted_positions() -> None:
    blocks = np.array([[1, 2, 3, 4], [1, 9, 2, 9], [1, 9, 9, 9], [9, 9, 9, 9], [1, 2, 3, 9]])
    assert counted_positions(blocks, 9).sum(1).tolist() == [4, 4, 2, 1, 4]


def test_shorten() -> None:
    blocks = np.arange(1, 9).reshape(2, 4)
    shortened, kept = shorten(blocks, np.array([1, 4]), 0)
    assert shortened.tolist() == [[1, 0, 0, 0], [5, 6, 7, 8]]
    assert kept.sum(1).tolist() == [1, 4]
