"""The directory of a run's checkpoints: which are there, which is the newest, what each says.

    RUN_DIR/checkpoints/step-N/    one checkpoint: torch.distributed.checkpoint's files (`.metadata`
                                   and one data file a process), meta.json, tokenizer/
    RUN_DIR/checkpoints/latest     a text file that names the newest, "step-N"

A checkpoint is written as step-N.tmp and renamed when all of it is on disk; only then does `latest`
name it.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from sedd_scale import __version__
from sedd_scale.data.atomic import write_atomically
from sedd_scale.errors import CheckpointError

FORMAT = "sedd_scale checkpoint"
FORMAT_VERSION = 1

# What the run says of itself in meta.json; the rest is added when it is saved.
META_KEYS = {
    "step",
    "samples_seen",
    "tokens",
    "config",
    "dataset_fingerprint",
    "tokenizer_fingerprint",
    "num_tokens",
    "block_length",
}

_STEP_NAME = re.compile(r"step-(\d+)")


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty directory for a checkpoint to be written in; what a crash left over is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*folder.glob("step-*.tmp"), *folder.glob("step-*.old")]:
        shutil.rmtree(leftover)
    temporary = folder / f"step-{step}.tmp"
    temporary.mkdir()
    return temporary


def publish_checkpoint(temporary: Path, *, keep: int) -> Path:
    """Let the directory, now complete, become step-N and `latest` name it; remove older ones.

    Args:
        temporary: what `begin_checkpoint` made.
        keep: checkpoints kept up to this one; 0: all.
    """
    folder, final = temporary.parent, temporary.with_suffix("")
    for path in [*temporary.rglob("*"), temporary]:
        sync_to_disk(path)
    if final.exists():  # the same step again, after a resume from an earlier one
        final.rename(final.with_suffix(".old"))
    temporary.rename(final)
    sync_to_disk(folder)
    write_atomically(folder / "latest", f"{final.name}\n".encode())
    sync_to_disk(folder)
    match = _STEP_NAME.fullmatch(final.name)
    assert match is not None, final
    steps = [step for step in _saved_steps(folder) if step <= int(match[1])]
    for step in steps[:-keep] if keep > 0 else []:
        # Renamed first, so that a half-removed directory never looks like a checkpoint.
        (folder / f"step-{step}").rename(folder / f"step-{step}.old")
    for old in folder.glob("step-*.old"):
        shutil.rmtree(old)
    return final


def has_checkpoint(run_dir: str | Path) -> bool:
    """Whether a checkpoint was ever completed here, so that a resume must find one."""
    folder = Path(run_dir) / "checkpoints"
    return (folder / "latest").exists() or bool(_saved_steps(folder))


def find_checkpoint(path: str | Path) -> Path:
    """The step-N directory that `path` means: itself, or what its `latest` names.

    Args:
        path: a run directory, its checkpoints/ folder, or one step-N directory.

    Raises:
        CheckpointError: naming what is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such directory")
    if _STEP_NAME.match(path.name):
        if not _STEP_NAME.fullmatch(path.name):
            raise CheckpointError(f"{path} is no checkpoint: its writing or removal was cut short")
        missing = [name for name in (".metadata", "meta.json") if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"checkpoint {path} is incomplete: it has no {missing[0]}")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    latest = folder / "latest"
    steps = _saved_steps(folder)
    instead = f"; name one of its checkpoints, such as {folder}/step-{steps[-1]}" if steps else ""
    if not latest.is_file():
        raise CheckpointError(f"no checkpoint in {folder}: it has no file 'latest'{instead}")
    name = latest.read_text(errors="replace").strip()
    if not _STEP_NAME.fullmatch(name):
        raise CheckpointError(f"{latest} holds {name!r}, not the name of a checkpoint{instead}")
    if not (folder / name).is_dir():
        raise CheckpointError(f"{latest} names {name}, which is missing{instead}")
    return find_checkpoint(folder / name)


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, meta.json.

    Args:
        path: a run directory, its checkpoints/ folder, or one step-N directory.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    path = find_checkpoint(path) / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint file {path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a {FORMAT}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {meta.get('format_version')}; "
            f"sedd_scale {__version__} reads version {FORMAT_VERSION}"
        )
    missing = (META_KEYS | {"optimizer_step", "versions", "shapes"}) - set(meta)
    if missing:
        raise CheckpointError(f"checkpoint file {path} is damaged: no {', '.join(sorted(missing))}")
    return meta


def _saved_steps(folder: Path) -> list[int]:
    """Steps of the folder's finished checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = [_STEP_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)


def sync_to_disk(path: Path) -> None:
    """Let a file's or directory's content reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
