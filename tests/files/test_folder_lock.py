"""Two jobs in one folder: the second is refused, and a killed one is in nobody's way."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sedd_scale.errors import ConfigError
from sedd_scale.files.folder_lock import LOCK_FILE, lock_folder

# A process with a forked child, which outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from sedd_scale.files.folder_lock import lock_folder

stream = lock_folder(Path(sys.argv[1]), option="--run-dir")
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that works in tmp_path / "run", and its child's number."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process, child
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_second_job_is_refused_until_the_first_is_gone(
    holder: tuple[subprocess.Popen[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, child = holder
    run_dir = tmp_path / "run"
    before = (run_dir / LOCK_FILE).read_text()
    for job in (None, "7"):  # a job's own nodes are no exception on the node that holds it
        if job is not None:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(ConfigError) as caught:
            lock_folder(run_dir, option="--run-dir", patience=0.1)
        line = str(caught.value)
        assert f"process {process.pid} on {socket.gethostname()}" in line
        assert "another --run-dir" in line and "\n" not in line
    assert (run_dir / LOCK_FILE).read_text() == before
    process.kill()
    process.wait()
    os.kill(child, 0)  # it is still there, and does not hold the lock
    with lock_folder(run_dir, option="--run-dir", patience=5.0):
        assert json.loads((run_dir / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_lost_node_does_not_stop_the_next_start_of_its_slurm_job(
    holder: tuple[subprocess.Popen[str], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run" / LOCK_FILE
    lost = json.loads(path.read_text()) | {"host": "node-lost", "slurm_job": "7"}
    path.write_text(json.dumps(lost))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    with pytest.raises(ConfigError, match="on node-lost of Slurm job 7"):
        lock_folder(path.parent, option="--run-dir", patience=0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock_folder(path.parent, option="--run-dir", patience=0.1).close()
    assert "on node-lost of Slurm job 7" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--run-dir .*file/run cannot be written: Not a dir"):
        lock_folder(tmp_path / "file" / "run", option="--run-dir")
