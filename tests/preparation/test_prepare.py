"""Preparation: blocks are the documents joined with EOS, in tars that webdataset reads too."""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_scale.data import shards
from sedd_scale.data.shards import BadShardError, Dataset, write_index
from sedd_scale.data.tar_blocks import token_dtype
from sedd_scale.errors import DataError
from sedd_scale.preparation.prepare import prepare
from sedd_scale.preparation.report import format_report
from sedd_scale.preparation.shard_writer import ShardWriter
from sedd_scale.preparation.splits import document_hash
from tests.data.corpus import make_texts, write_jsonl


def prepare_texts(directory: Path, texts: list[str], **arguments: Any) -> Dataset:
    source = write_jsonl(directory / "texts.jsonl", texts)
    chosen: dict[str, Any] = {"tokenizer": "bytes", "block_length": 48, "blocks_per_shard": 100}
    prepare([str(source)], output=directory / "out", **{**chosen, **arguments})
    return Dataset(directory / "out")


def files_of(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("kind", ["bytes", "text8", "sentencepiece"])
def test_blocks_are_documents_joined_with_eos(tmp_path: Path, kind: str) -> None:
    texts = make_texts(60)
    vocab_size = 400 if kind == "sentencepiece" else None
    dataset = prepare_texts(
        tmp_path,
        [*texts[:30], " \n", *texts[30:]],
        tokenizer=kind,
        vocab_size=vocab_size,
        valid_fraction=0.2,
        test_fraction=0.2,
    )
    tokenizer = dataset.load_tokenizer()
    assert tokenizer.kind == kind
    assert dataset.vocab_size == tokenizer.vocab_size
    begin = {"valid": 0.0, "test": 0.2, "train": 0.4}
    end = {"valid": 0.2, "test": 0.4, "train": 1.0}
    seen = 0
    for split, entry in dataset.splits.items():
        ids: list[int] = []
        counts: Counter[int] = Counter()
        documents = []
        for text in texts:
            fraction = int.from_bytes(document_hash(text)[:8], "big") / 2**64
            if begin[split] <= fraction < end[split]:
                documents.append(text)
                ids += [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
        counts.update(ids)
        reader = dataset.reader(split)
        blocks = reader.read(np.arange(len(reader)))
        whole = len(ids) - len(ids) % 48
        assert blocks.reshape(-1).tolist() == ids[:whole]
        assert entry["documents"] == len(documents) > 0
        assert entry["tokens"] == len(ids)
        assert entry["dropped_tokens"] == len(ids) - whole
        assert entry["blocks"] == sum(shard["blocks"] for shard in entry["shards"]) == len(reader)
        spelled = [tokenizer.normalize(text) for text in documents]
        assert entry["characters"] == sum(map(len, spelled))
        assert entry["utf8_bytes"] == sum(len(text.encode()) for text in spelled)
        entropy = -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
        assert entry["unigram_entropy_nats"] == pytest.approx(entropy, rel=1e-12)
        seen += len(documents)
    assert seen == len(texts)
    assert dataset.verify() == sum(
        shard["bytes"] for entry in dataset.splits.values() for shard in entry["shards"]
    )


def test_webdataset_reads_the_same_blocks(tmp_path: Path) -> None:
    import webdataset

    dataset = prepare_texts(tmp_path, make_texts(60))
    entries = dataset.splits["train"]["shards"]
    assert len(entries) > 2, "several shards"
    urls = [str(dataset.path / shard["name"]) for shard in entries]
    stream = webdataset.WebDataset(urls, shardshuffle=False).decode()
    samples = list(stream)
    reader = dataset.reader("train")
    assert [int(sample["__key__"]) for sample in samples] == list(range(len(reader)))
    blocks = np.stack([sample["npy"] for sample in samples])
    assert blocks.dtype == np.uint16
    assert np.array_equal(blocks, reader.read(np.arange(len(reader))))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_equal_input_gives_equal_bytes(tmp_path: Path, kind: str) -> None:
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        size = 350 if kind == "sentencepiece" else None
        dataset = prepare_texts(tmp_path / name, make_texts(50), tokenizer=kind, vocab_size=size)
        written.append(files_of(dataset.path))
    assert written[0] == written[1]
    assert set(written[0]) >= {"index.json", "tokenizer/tokenizer.json", "train-000000.tar"}
    for name, content in written[0].items():
        if name.endswith(".tar"):
            split = name.split("-")[0]
            (entry,) = [e for e in dataset.splits[split]["shards"] if e["name"] == name]
            assert entry["sha256"] == hashlib.sha256(content).hexdigest()
            assert entry["bytes"] == len(content)


def test_batches_and_shards_do_not_change_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []
    for name, documents, per_shard in (("a", 4096, 100), ("b", 3, 7)):
        monkeypatch.setattr("sedd_scale.preparation.prepare.BATCH_DOCUMENTS", documents)
        (tmp_path / name).mkdir()
        dataset = prepare_texts(tmp_path / name, make_texts(50), blocks_per_shard=per_shard)
        reader = dataset.reader("train")
        blocks.append(reader.read(np.arange(len(reader))))
    assert np.array_equal(blocks[0], blocks[1])


def test_random_access_with_few_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = prepare_texts(tmp_path, make_texts(60), blocks_per_shard=7)
    reader = dataset.reader("train")
    whole = reader.read(np.arange(len(reader)))
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    few = dataset.reader("train")
    wanted = np.random.default_rng(0).integers(0, len(few), 500)
    assert np.array_equal(few.read(wanted), whole[wanted])
    assert few._open.cache_info().currsize == 2
    assert few.read([]).shape == (0, 48)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    blocks = np.array([[0, 65_535, 65_536, 99_999], [1, 2, 3, 4]], dtype=np.int64)
    writer = ShardWriter(tmp_path, "train", block_length=4, vocab_size=100_000, blocks_per_shard=10)
    writer.write(blocks)
    writer.close()
    entry = {"shards": writer.shards, "blocks": 2}
    write_index(
        tmp_path,
        {"block_length": 4, "vocab_size": 100_000, "eos_id": 0, "splits": {"train": entry}},
    )
    dataset = Dataset(tmp_path)
    assert dataset.index["dtype"] == "<u4"
    assert np.array_equal(dataset.reader("train").read([1, 0]), blocks[::-1])
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_one_text_file_makes_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "lone.txt").write_text("\n\n".join(make_texts(80)), encoding="utf-8")
    index = prepare(
        [str(tmp_path / "lone.txt")],
        output=tmp_path / "out",
        block_length=64,
        tokenizer="bytes",
    )
    assert index["splits"]["valid"]["documents"] >= 1
    assert index["splits"]["train"]["documents"] > 10
    report = format_report(index)
    assert f"{index['splits']['train']['tokens']:,}" in report


def test_no_validation_when_asked(tmp_path: Path) -> None:
    dataset = prepare_texts(tmp_path, make_texts(3), valid_fraction=0.0)
    assert list(dataset.splits) == ["train"]
    with pytest.raises(DataError, match="has no split 'valid', only train"):
        dataset.reader("valid")


@pytest.mark.parametrize("change", [-1, -5000, +512])
def test_a_shard_of_another_size(tmp_path: Path, change: int) -> None:
    dataset = prepare_texts(tmp_path, make_texts(30))
    shard = dataset.path / "train-000000.tar"
    content = shard.read_bytes()
    size = len(content) + change
    shard.write_bytes(content[:size] + bytes(max(0, change)))
    how = "cut short" if change < 0 else "has grown"
    message = rf"train-000000\.tar .*{how}: has {size} bytes, index says {len(content)}; prepare"
    with pytest.raises(DataError, match=message):
        dataset.reader("train")


def test_damage_inside_a_shard(tmp_path: Path) -> None:
    dataset = prepare_texts(tmp_path, make_texts(30))
    first, second = (dataset.path / f"train-00000{number}.tar" for number in (0, 1))
    original = first.read_bytes()

    first.write_bytes(second.read_bytes())
    with pytest.raises(BadShardError, match=r"does not hold member 0+3\.npy at byte 3072") as hit:
        dataset.reader("train").read([3])

    damaged = bytearray(original)
    position = dataset.index["data_offset"] + 3 * dataset.index["stride"]
    damaged[position : position + 2] = b"\xff\xff"
    first.write_bytes(damaged)
    assert hit.value.shard == 0
    with pytest.raises(BadShardError, match=r"000003\.npy with other bytes than were written"):
        dataset.reader("train").read([2, 3])
    assert dataset.reader("train").read([2]).shape == (1, 48)
    with pytest.raises(DataError, match=r"train-000000\.tar is damaged \(its SHA-256"):
        dataset.verify()

    first.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is missing"):
        dataset.reader("train")


def test_a_changed_index(tmp_path: Path) -> None:
    dataset = prepare_texts(tmp_path, make_texts(30))
    path = dataset.path / "index.json"
    original = path.read_text()
    for content, message in (
        (original[:-40], "is damaged"),
        (original.replace('"vocab_size": 257', '"vocab_size": 300'), "fingerprint does not fit"),
        ("[]", "is not a dataset of this program"),
        (json.dumps({**dataset.index, "version": 99}), "has version 99"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            Dataset(dataset.path)
    path.unlink()
    with pytest.raises(DataError, match=r"holds no index\.json: prepare a dataset there"):
        Dataset(dataset.path)


def test_another_tokenizer_in_the_dataset(tmp_path: Path) -> None:
    from sedd_scale.tokenizers.alphabets import Text8Tokenizer

    dataset = prepare_texts(tmp_path, make_texts(30))
    Text8Tokenizer().save(dataset.path / "tokenizer")
    with pytest.raises(DataError, match="is not the tokenizer of this dataset"):
        dataset.load_tokenizer()
