"""A preparation that is stopped goes on where it was, and ends with the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.preparation import journal
from sedd_scale.preparation.prepare import Progress, prepare
from tests.data.corpus import make_texts, write_jsonl
from tests.repository import ROOT

CHOSEN: dict[str, Any] = {"block_length": 32, "tokenizer": "bytes", "blocks_per_shard": 50}


def files_of(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sedd_scale.preparation.prepare.BATCH_DOCUMENTS", 5)
    texts = make_texts(60)
    return write_jsonl(tmp_path / "texts.jsonl", texts[:50] + texts[20:40] + texts[50:])


def stop_after(batches: int) -> Any:
    seen = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == batches:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("packing", ["continuous", "documents"])
@pytest.mark.parametrize("stops", [[1], [7], [3, 4], [13]], ids=str)
def test_stopped_anywhere(source: Path, tmp_path: Path, packing: str, stops: list[int]) -> None:
    arguments = {**CHOSEN, "packing": packing, "dedupe": True, "test_fraction": 0.1}
    clean = prepare([str(source)], output=tmp_path / "clean", **arguments)
    assert clean["duplicates_dropped"] == 20
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            prepare(
                [str(source)], output=tmp_path / "out", on_progress=stop_after(stop), **arguments
            )
        assert (tmp_path / "out" / journal.JOURNAL_FILE).exists()
        assert not (tmp_path / "out/index.json").exists()
    prepare([str(source)], output=tmp_path / "out", **arguments)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_finished_shards_are_not_made_again(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare([str(source)], output=tmp_path / "out", on_progress=stop_after(8), **CHOSEN)
    state = journal.json.loads((tmp_path / "out" / journal.JOURNAL_FILE).read_text())["state"]
    finished = [shard["name"] for shard in state["splits"]["train"]["writer"]["shards"]]
    assert len(finished) > 3
    before = {name: (tmp_path / "out" / name).stat() for name in finished}
    prepare([str(source)], output=tmp_path / "out", **CHOSEN)
    for name, status in before.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)


def test_killed_with_its_processes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", make_texts(300) * 100)
    command = [
        *(
            sys.executable,
            "-m",
            "sedd_scale",
            "prepare_data",
            "--input",
            str(source),
            "--tokenizer",
            "text8",
        ),
        *("--block-length", "256", "--blocks-per-shard", "100", "--processes", "2", "--output"),
    ]
    out = tmp_path / "out"
    started = subprocess.Popen([*command, str(out)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*.tar"))) < 2:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (out / "index.json").exists()
    other = subprocess.run(
        [*command, str(out), "--valid-fraction", "0.3"], cwd=ROOT, capture_output=True, text=True
    )
    assert other.returncode == 2
    assert "unfinished preparation with another --valid-fraction" in other.stderr
    subprocess.run([*command, str(out)], cwd=ROOT, check=True, capture_output=True)
    clean = tmp_path / "clean"
    prepare([str(source)], output=clean, tokenizer="text8", block_length=256, blocks_per_shard=100)
    assert files_of(out) == files_of(clean), "on one process, in one go"
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its killed parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def test_another_input_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare([str(source)], output=tmp_path / "out", on_progress=stop_after(3), **CHOSEN)
    for change, flag in (({"block_length": 64}, "--block-length"), ({"dedupe": True}, "--dedupe")):
        with pytest.raises(ConfigError, match=f"with another {flag} .*: give the same command"):
            prepare([str(source)], output=tmp_path / "out", **{**CHOSEN, **change})
    with source.open("a") as stream:
        stream.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match="with another --input:"):
        prepare([str(source)], output=tmp_path / "out", **CHOSEN)


def test_lost_and_changed_files_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare([str(source)], output=tmp_path / "out", on_progress=stop_after(8), **CHOSEN)
    (tmp_path / "out/train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"lacks .*train-000001\.tar"):
        prepare([str(source)], output=tmp_path / "out", **CHOSEN)


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Peak memory of a process that prepares 6 times as much text is within 25 MB."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sedd_scale.preparation.prepare import prepare\n"
        "prepare([sys.argv[1]], output=Path(sys.argv[2]), block_length=256, tokenizer='bytes',\n"
        "        processes=1, dedupe=True)\n"
        "lines = open('/proc/self/status')\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))\n"
    )
    peaks = []
    for times in (2, 12):
        texts = [f"{number} {text}" for number in range(8 * times) for text in make_texts(400)]
        source = write_jsonl(tmp_path / f"{times}.jsonl", texts)
        done = subprocess.run(
            [sys.executable, "-c", program, str(source), str(tmp_path / f"out{times}")],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 25, peaks
