"""Joins what the jobs of an array drew into the file that one process would have written.

    python -m sedd_scale.cluster.merge_samples samples.jsonl --shards 4

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


def merge_samples(output: Path, num_shards: int, prompts: Path | None = None) -> bool:
    """Write `output` from its shards and remove them; whether it is there now.

    The order is that of the samples' places; of an older version, of the prompts, ids or shards.

    Raises:
        DataError: a record's id is none of the prompts', or stands twice; or a line is damaged.
    """
    from sedd_scale.generation.output_shards import sample_line
    from sedd_scale.generation.samples_file import report_path

    shards = [shard_path(output, number, num_shards) for number in range(num_shards)]
    try:
        texts = [shard.read_bytes().splitlines(keepends=True) for shard in shards]
    except FileNotFoundError:  # not drawn yet; or merged, by a job that ended with this one
        return output.exists()
    lines: dict[int | str, bytes] = {}  # by place, or by id
    for shard, text in zip(shards, texts, strict=True):
        for number, line in enumerate(text, start=1):
            try:
                record = json.loads(line)
                key = record.pop("place", str(record["id"]))
            except (ValueError, TypeError, AttributeError, KeyError):
                raise DataError(
                    f"{shard}:{number} is no sample: remove the shard and draw it anew"
                ) from None
            if key in lines:
                raise DataError(
                    f"two samples of {output}'s shards have the id {str(record['id'])!r}: draw anew"
                )
            lines[key] = sample_line(record) if isinstance(key, int) else line
    if all(isinstance(key, int) for key in lines):
        order = sorted(lines)
    elif prompts is not None:
        order = [name for name in prompt_ids(prompts) if name in lines]
    else:
        is_counted = all(str(key).isdecimal() for key in lines)
        order = sorted(lines, key=int) if is_counted else [*lines]
    if len(order) != len(lines):
        unknown = next(iter(lines.keys() - set(order)))
        raise DataError(f"a sample's id {unknown!r} is not in {prompts}: was the file changed?")
    # Two jobs that end together write the same.
    temporary = output.with_name(f"{output.name}.{os.environ.get('SLURM_JOB_ID', os.getpid())}.tmp")
    temporary.write_bytes(b"".join(lines[name] for name in order))
    temporary.replace(output)
    for shard in shards:
        shard.unlink(missing_ok=True)
        report_path(shard).unlink(missing_ok=True)
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
    parser.add_argument(
        "--prompts", type=given_path, help="of shards that an older version drew: gives their order"
    )
    return run_command(parser, _command)


if __name__ == "__main__":
    sys.exit(main())
