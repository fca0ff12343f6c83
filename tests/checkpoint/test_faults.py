"""Damage, full disks and unwritable directories, with one process and a small state."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.checkpoint import fault_points
from sedd_scale.checkpoint.reading import load_newest
from sedd_scale.checkpoint.writer import CheckpointWriter
from sedd_scale.config.sections import CheckpointConfig
from sedd_scale.errors import CheckpointError
from sedd_scale.parallel.layout import initialize_layout
from tests.checkpoint.stand_in_state import StandInState, meta_of

SHAPE = (256, 256)  # a megabyte for the four tensors


@pytest.fixture
def state() -> Iterator[Any]:
    """What readers and writers take, in a group of one process."""
    yield StandInState(SHAPE, initialize_layout())
    fault_points._handlers.clear()


def save(state: Any, run_dir: Path, *steps: int, **config: Any) -> None:
    with CheckpointWriter(run_dir, state, config=CheckpointConfig(**config)) as writer:
        for step in steps:
            state.fill(step)
            writer.save(meta_of(step))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def test_what_is_saved_is_the_state_at_the_save(state: Any, tmp_path: Path) -> None:
    free: list[None] = []
    with CheckpointWriter(tmp_path, state, config=CheckpointConfig()) as writer:
        state.fill(1)
        fault_points.at("before data", lambda: free.append(state.fill(7)))
        writer.save(meta_of(1))  # the thread overwrites the live state before it writes the copy
    assert free
    assert load_newest(tmp_path, state)[1]["step"] == 1
    assert state.is_of(1)


def test_every_nth_is_kept_for_good(state: Any, tmp_path: Path) -> None:
    save(state, tmp_path, 10, 20, 30, 40, 50, keep=1, keep_every=20)
    assert names(tmp_path) == ["step-20", "step-40", "step-50"]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "meta.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_damage_falls_back_to_the_one_before_and_says_so(
    state: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    file: str,
    how: str,
) -> None:
    save(state, tmp_path, 1, 2, 3)
    path = tmp_path / "checkpoints/step-3" / file
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    said: list[str] = []
    source, found = load_newest(tmp_path, state, say=said.append)
    assert source.name == "step-2" and found["step"] == 2
    assert state.is_of(2)
    for text in (capfd.readouterr().err, *said):
        assert file in text or "SHA-256" in text
        assert "went on from" in text and "step-2" in text
    assert said


def test_no_good_checkpoint_where_one_is_expected_is_an_error(state: Any, tmp_path: Path) -> None:
    save(state, tmp_path, 1, 2)
    for step in names(tmp_path):
        os.truncate(tmp_path / "checkpoints" / step / "__0_0.distcp", 100)
    state.fill(9)
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*step-2.*step-1"):
        load_newest(tmp_path, state)
    assert state.is_of(9)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of five megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_leaves_the_last_one_and_follows_the_policy(
    state: Any,
    small_disk: Path,
    capfd: pytest.CaptureFixture[str],
    policy: str,
) -> None:
    run_dir, filler = small_disk / "run", small_disk / "filler"
    save(state, run_dir, 1)
    with CheckpointWriter(run_dir, state, config=CheckpointConfig(on_failure=policy)) as writer:
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
        state.fill(2)
        writer.save(meta_of(2))
        if policy == "stop":
            with pytest.raises(CheckpointError, match=r"step-2.*No space left on device"):
                writer.wait()
        else:
            report = writer.wait()
            assert report is not None and "No space left" in str(report.error)
            assert "training goes on" in capfd.readouterr().err
        assert names(run_dir) == ["step-1"]
        assert (run_dir / "checkpoints/latest").read_text() == "step-1\n"
        filler.unlink()
        state.fill(3)
        writer.save(meta_of(3))
    assert names(run_dir) == ["step-1", "step-3"]
    assert load_newest(run_dir, state)[1]["step"] == 3 and state.is_of(3)


def test_too_small_or_unwritable_a_disk_is_found_at_the_start(state: Any, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
    with pytest.raises(CheckpointError, match=r"No space left.*--run-dir"):
        save(state, small_disk / "run", 1)
    (small_disk / "file").touch()
    with pytest.raises(CheckpointError, match=r"Not a directory.*--run-dir"):
        save(state, small_disk / "file", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*--run-dir"):
        save(state, small_disk / "run", 1)
