"""Shards of an array become the file of one process, in its order."""

import json
from pathlib import Path

import pytest

from sedd_scale.cluster.merge_samples import merge_samples, shard_path
from sedd_scale.errors import DataError


def write(path: Path, ids: list[object]) -> None:
    path.write_text("".join(json.dumps({"id": name}) + "\n" for name in ids))


def ids_of(path: Path) -> list[object]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_prompts_give_the_order(tmp_path: Path) -> None:
    output, prompts = tmp_path / "all.jsonl", tmp_path / "prompts.jsonl"
    lines = [{"prefix": "a", "num_samples": 3}, {"prefix": "b", "id": "last"}, {"prefix": "c"}]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    write(shard_path(output, 0, 2), ["1-1", 3])
    assert not merge_samples(output, 2, prompts) and not output.exists()
    write(shard_path(output, 1, 2), ["last", "1-0", "1-2"])
    assert merge_samples(output, 2, prompts)
    assert ids_of(output) == ["1-0", "1-1", "1-2", "last", 3]
    assert {path.name for path in tmp_path.iterdir()} == {"all.jsonl", "prompts.jsonl"}
    assert merge_samples(output, 2, prompts)  # the one that ended at the same time


def test_samples_without_prompts_are_ordered_by_number(tmp_path: Path) -> None:
    output = tmp_path / "all.jsonl"
    write(shard_path(output, 0, 2), [0, 10, 2])
    write(shard_path(output, 1, 2), [9, 1])
    assert merge_samples(output, 2, None)
    assert ids_of(output) == [0, 1, 2, 9, 10]


def test_an_id_that_is_double_or_unknown_is_named(tmp_path: Path) -> None:
    output, prompts = tmp_path / "all.jsonl", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prefix": "a"}\n')
    write(shard_path(output, 0, 2), [1])
    write(shard_path(output, 1, 2), [1])
    with pytest.raises(DataError, match="'1'"):
        merge_samples(output, 2, prompts)
    write(shard_path(output, 1, 2), [5])
    with pytest.raises(DataError, match="'5'"):
        merge_samples(output, 2, prompts)
    assert not output.exists()
