"""A run's unfinished output, cut anywhere, is gone on with: nothing twice, nothing missing."""

import json
import os
import random
import stat
from pathlib import Path

import pytest

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.files.atomic import refuse_existing_output
from sedd_scale.generation.output_shards import Record, ShardDirectory

# Eight samples in batches whose order is not that of the samples.
BATCHES = [[0, 3], [1, 2, 7], [4], [5, 6]]
RUN = {"--steps": 4, "--seed": 0}


def record(index: int) -> Record:
    return {
        "id": f"n{index}",
        "text": 'a "line"\nof\u2028text\ud800'[index % 4 :],
        "tokens": [index],
    }


def opened(output: Path, run: dict[str, object] | None = None) -> ShardDirectory:
    shards = ShardDirectory(output, BATCHES)
    shards.open(run or RUN, "here")
    return shards


def write(shards: ShardDirectory, *batches: int) -> Path:
    """One process's file with these batches."""
    writer = shards.writer(shards.next_number())
    for batch in batches:
        writer.append(BATCHES[batch], [record(index) for index in BATCHES[batch]])
    writer.close()
    return writer.path


def finish(output: Path) -> list[Record]:
    """Open, draw what is missing, merge; as a run does."""
    shards = opened(output)
    finished = shards.recover()
    missing = [batch for batch in range(len(BATCHES)) if batch not in finished]
    if missing:
        write(shards, *missing)
    seen: list[Record] = []
    shards.merge(seen.append)
    shards.remove()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [entry["id"] for entry in seen] == [entry["id"] for entry in records]
    return records


def expected() -> list[Record]:
    encoded = json.dumps([record(index) for index in range(8)], ensure_ascii=False)
    return json.loads(encoded.encode(errors="replace"))


def test_cut_at_any_byte_a_run_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    shards = opened(output)
    write(shards, 2)
    content = write(shards, 3, 0, 1).read_bytes()
    shards.close()
    ends = [0]
    for batch in (3, 0, 1):
        lines = content[ends[-1] :].splitlines(keepends=True)[: len(BATCHES[batch])]
        ends.append(ends[-1] + sum(map(len, lines)))
    assert ends[-1] == len(content)
    for cut in range(len(content) + 1):
        (shards.path / "part-00001.jsonl").write_bytes(content[:cut])
        again = opened(output)
        whole = sum(end <= cut for end in ends[1:])
        assert again.recover() == sorted([2, *(3, 0, 1)[:whole]])
        assert (shards.path / "part-00001.jsonl").stat().st_size == ends[whole]
        again.close()
    for cut in random.Random(0).sample(range(len(content)), 12):
        (shards.path / "part-00001.jsonl").write_bytes(content[:cut])
        assert finish(output) == expected()
        assert not shards.path.exists()
        output.unlink()
        write(opened(output), 2)
        (shards.path / "part-00001.jsonl").write_bytes(b"")


def test_a_batch_that_two_files_hold_counts_once(tmp_path: Path) -> None:
    shards = opened(tmp_path / "out.jsonl")
    write(shards, 0, 1)
    write(shards, 1, 2)
    shards.close()
    assert finish(tmp_path / "out.jsonl") == expected()


def test_zeros_after_a_power_cut_are_a_torn_end(tmp_path: Path) -> None:
    shards = opened(tmp_path / "out.jsonl")
    path = write(shards, 0, 1)
    content = path.read_bytes()
    end = sum(map(len, content.splitlines(keepends=True)[:2]))
    path.write_bytes(content[: end + 4] + bytes(len(content) - end - 4))
    shards.close()
    again = opened(tmp_path / "out.jsonl")
    assert again.recover() == [0]
    assert path.read_bytes() == content[:end]


def test_damage_before_the_end_is_not_cut_away(tmp_path: Path) -> None:
    shards = opened(tmp_path / "out.jsonl")
    path = write(shards, 0, 1, 3)
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.jsonl is damaged after byte 0, with 7 more"):
        shards.recover()
    assert path.read_bytes() == content


def test_a_line_damaged_within_is_named_at_the_merge(tmp_path: Path) -> None:
    shards = opened(tmp_path / "out.jsonl")
    path = write(shards, 0, 1, 2, 3)
    path.write_bytes(path.read_bytes().replace(b'"id": "n7"', b'"id"; "n7"'))
    with pytest.raises(DataError, match=r"part-00000\.jsonl is damaged"):
        shards.merge()
    assert not (tmp_path / "out.jsonl").exists()


def test_another_run_is_refused_and_named(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    shards = opened(output)
    path = write(shards, 0)
    shards.close()
    before = path.read_bytes()
    for run, message in [
        ({**RUN, "--steps": 5}, r"another --steps \(4, now 5\)"),
        ({"--steps": 4}, r"another --seed \(0, now None\)"),
        ({**RUN, "--top-k": 3}, r"another --top-k \(None, now 3\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            opened(output, run)
    (shards.path / "run.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        opened(output)
    (shards.path / "run.json").unlink()
    with pytest.raises(DataError, match=r"no run\.json"):
        opened(output)
    assert path.read_bytes() == before


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = opened(output)
    with pytest.raises(DataError, match="in use by another process"):
        opened(output)
    assert first.sees("here") and not first.sees("elsewhere")
    writer = first.writer(0)
    first.close()
    # The first process is gone, another of its run still writes.
    with pytest.raises(DataError, match="still being written"):
        opened(output).recover()
    writer.close()
    assert not writer.path.exists()


def test_a_gap_is_never_merged(tmp_path: Path) -> None:
    shards = opened(tmp_path / "out.jsonl")
    write(shards, 0, 1, 3)
    with pytest.raises(DataError, match="lacks sample 4"):
        shards.merge()
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_made_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    shards = opened(tmp_path / "out.jsonl")
    write(shards, 0, 1, 2, 3)
    (tmp_path / "out.jsonl").write_text("kept")
    with pytest.raises(DataError, match="exists already"):
        shards.merge()
    assert (tmp_path / "out.jsonl").read_text() == "kept"


def test_outputs_that_cannot_be_written_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="there is no directory"):
        refuse_existing_output(tmp_path / "no" / "out.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="exists already"):
        refuse_existing_output(tmp_path / "link")
    (tmp_path / "out.jsonl.parts").write_text("a file in the way")
    with pytest.raises(DataError, match="cannot be written"):
        opened(tmp_path / "out.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="is not writable"):
        refuse_existing_output(tmp_path / "new.jsonl")


def test_a_full_disk_keeps_the_batches_before(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not (full.exists() and stat.S_ISCHR(full.stat().st_mode)):
        pytest.skip("no /dev/full on this system")
    shards = opened(tmp_path / "out.jsonl")
    writer = shards.writer(0)
    writer.append(BATCHES[0], [record(index) for index in BATCHES[0]])
    kept = writer.path.read_bytes()
    descriptor = os.open(full, os.O_WRONLY)
    own = os.dup(writer._stream.fileno())
    os.dup2(descriptor, writer._stream.fileno())  # writes now fail as on a full disk
    os.close(descriptor)
    with pytest.raises(DataError, match="No space left on device"):
        writer.append(BATCHES[1], [record(index) for index in BATCHES[1]])
    os.dup2(own, writer._stream.fileno())
    os.close(own)
    writer.close()
    assert writer.path.read_bytes() == kept
    shards.close()
    assert finish(tmp_path / "out.jsonl") == expected()
