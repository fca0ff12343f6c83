"""Looking at a dataset: its counts, a few blocks as text, and every checksum."""

import os
from collections.abc import Iterator
from pathlib import Path

from sedd_scale.data.cache import FileCache
from sedd_scale.data.joint_reader import spread_blocks
from sedd_scale.data.remote_sources import is_remote
from sedd_scale.data.shards import Dataset
from sedd_scale.preparation.report import format_report

# Room for any one shard; inspecting reads each once.
CACHE_BYTES = 8 * 10**9


def inspect_dataset(
    location: str | os.PathLike[str],
    *,
    split: str = "train",
    num_blocks: int = 3,
    characters: int = 400,
    cache_dir: Path,
) -> Iterator[str]:
    """The lines of a report; the last one says that every checksum was right.

    Args:
        location: a directory, a URL or `pipe:` and a command.
        split: which split's blocks are shown.
        num_blocks: how many, evenly spread.
        characters: how much of each is shown.
        cache_dir: where files of a remote dataset are kept.

    Raises:
        DataError: the dataset or its tokenizer is missing or damaged; which shard, and where.
    """
    cache = FileCache(cache_dir, CACHE_BYTES) if is_remote(str(location)) else None
    dataset = Dataset(location, cache=cache)
    yield f"{dataset.location}, fingerprint {dataset.fingerprint}"
    yield format_report(dataset.index)
    tokenizer = dataset.load_tokenizer()
    reader = dataset.reader(split)
    for block in spread_blocks(len(reader), num_blocks).tolist():
        text = tokenizer.decode(reader.read([block])[0].tolist())
        shown = text[:characters] + ("..." if len(text) > characters else "")
        yield f"\n--- {split} block {block} ---\n{shown}"
    shards = sum(len(entry["shards"]) for entry in dataset.splits.values())
    yield f"\n{shards} shards, {dataset.verify():,} bytes: every SHA-256 is right"
