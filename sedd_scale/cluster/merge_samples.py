"""Joins what the jobs of an array drew into the file that one process would have written.

    python -m sedd_scale.cluster.merge_samples samples.jsonl --shards 4 --prompts prompts.jsonl

The last job of the array to end does it: until then some shard is missing, and nothing happens.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from sedd_scale.cli import count, given_path, make_parser, run_command
from sedd_scale.errors import DataError


def shard_path(output: Path, shard: int, num_shards: int) -> Path:
    """Where the job with this number writes."""
    return output.with_name(f"{output.stem}.shard-{shard}-of-{num_shards}{output.suffix}")


def prompt_ids(prompts: Path) -> list[str]:
    """The ids of the samples of a prompts file, as text, in their order; bad lines left out."""
    from sedd_scale.generation.prompts_file import read_prompt_lines

    ids = []
    for line in read_prompt_lines(prompts, on_bad=lambda error: None):
        name, count = line.record["id"], line.record.get("num_samples", 1)
        ids += [f"{name}"] if count == 1 else [f"{name}-{number}" for number in range(count)]
    return ids


def merge_samples(output: Path, num_shards: int, prompts: Path | None) -> bool:
    """Write `output` from its shards and remove them; whether it is there now.

    Raises:
        DataError: a record's id is none of the prompts', or stands twice.
    """
    shards = [shard_path(output, number, num_shards) for number in range(num_shards)]
    try:
        texts = [shard.read_bytes().splitlines(keepends=True) for shard in shards]
    except FileNotFoundError:  # not drawn yet; or merged, by a job that ended with this one
        return output.exists()
    records: dict[str, bytes] = {}
    for line in (line for text in texts for line in text):
        name = str(json.loads(line)["id"])
        if name in records:
            raise DataError(f"two samples of {output}'s shards have the id {name!r}: draw anew")
        records[name] = line
    if prompts is None:
        order = sorted(records, key=int)
    else:
        order = [name for name in prompt_ids(prompts) if name in records]
    if len(order) != len(records):
        unknown = next(iter(records.keys() - set(order)))
        raise DataError(f"a sample's id {unknown!r} is not in {prompts}: was the file changed?")
    # Two jobs that end together write the same.
    temporary = output.with_name(f"{output.name}.{os.environ.get('SLURM_JOB_ID', os.getpid())}.tmp")
    temporary.write_bytes(b"".join(records[name] for name in order))
    temporary.replace(output)
    for shard in shards:
        shard.unlink(missing_ok=True)
    return True


def _command(arguments: argparse.Namespace) -> None:
    if merge_samples(arguments.output, arguments.shards, arguments.prompts):
        print(arguments.output)
    else:
        print(f"{arguments.output} waits for the other shards")


def main() -> int:
    """The command of slurm/generate.sh."""
    parser = make_parser(
        "python -m sedd_scale.cluster.merge_samples",
        "Join the shards of a generation into one file, once all are there.",
        "python -m sedd_scale.cluster.merge_samples samples.jsonl --shards 4",
    )
    parser.add_argument("output", type=given_path)
    parser.add_argument("--shards", type=count, required=True)
    parser.add_argument("--prompts", type=given_path)
    return run_command(parser, _command)


if __name__ == "__main__":
    sys.exit(main())
