"""The directory of a run's checkpoints: which are there, which is the newest, what each says.

    RUN_DIR/checkpoints/step-N/    one checkpoint: torch.distributed.checkpoint's files (`.metadata`
                                   and one data file a process), meta.json, tokenizer/, and
                                   manifest.json with the size and SHA-256 of all of them
    RUN_DIR/checkpoints/latest     a text file that names the newest, "step-N"

A checkpoint is written as step-N.tmp, put on disk, and renamed when all of it is there; only then
does `latest` name it. What is to be removed is first renamed to step-N.purge. A finished step-N
that is written again waits as step-N.old until the new one is in its place. So whatever moment a
crash picks, a directory with a final name is whole.
"""

import contextlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from sedd_scale.checkpoint import fault_points
from sedd_scale.checkpoint.manifest import MANIFEST, read_manifest, record_of
from sedd_scale.errors import CheckpointError, DamagedCheckpointError
from sedd_scale.files.atomic import sync_to_disk, write_atomically
from sedd_scale.version import __version__

FORMAT = "sedd_scale checkpoint"
FORMAT_VERSION = 2

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
    restore_replaced(folder)
    remove_leftovers(folder)
    temporary = folder / f"step-{step}.tmp"
    temporary.mkdir()
    return temporary


def publish_checkpoint(temporary: Path, *, keep: int, keep_every: int = 0) -> Path:
    """Let the directory, now complete, become step-N and `latest` name it; remove older ones.

    Args:
        temporary: what `begin_checkpoint` made, with its manifest.
        keep: checkpoints kept up to this one; 0: all.
        keep_every: checkpoints at multiples of this step are never removed; 0: no such.
    """
    assert (temporary / MANIFEST).is_file(), temporary
    folder, final = temporary.parent, temporary.with_suffix("")
    for path in [*temporary.rglob("*"), temporary]:
        sync_to_disk(path)
    fault_points.reach("before rename")
    if final.exists():  # the same step again, after a resume from an earlier one
        final.rename(final.with_suffix(".old"))
    temporary.rename(final)
    sync_to_disk(folder)
    fault_points.reach("between rename and latest")
    write_atomically(folder / "latest", f"{final.name}\n".encode())
    sync_to_disk(folder)
    try:
        _remove_older(final, keep=keep, keep_every=keep_every)
    except OSError as error:  # the new one is safe, and the next save tries again
        print(f"warning: cannot remove an old checkpoint: {error}", file=sys.stderr, flush=True)
    return final


def _remove_older(final: Path, *, keep: int, keep_every: int) -> None:
    folder = final.parent
    match = _STEP_NAME.fullmatch(final.name)
    assert match is not None, final
    steps = [step for step in saved_steps(folder) if step <= int(match[1])]
    for step in steps[:-keep] if keep > 0 else []:
        if not keep_every or step % keep_every:
            # Renamed first, so that a half-removed directory never looks like a checkpoint.
            (folder / f"step-{step}").rename(folder / f"step-{step}.purge")
    fault_points.reach("within removal")
    remove_leftovers(folder)


def restore_replaced(folder: Path) -> None:
    """Undo the first half of a replacement that a crash cut short between its two renames."""
    for old in folder.glob("step-*.old"):
        if not old.with_suffix("").exists():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                old.rename(old.with_suffix(""))


def remove_leftovers(folder: Path) -> None:
    """Remove directories that are no checkpoints: begun, replaced, or to be removed."""
    for suffix in ("tmp", "old", "purge"):
        for leftover in folder.glob(f"step-*.{suffix}"):
            shutil.rmtree(leftover)
    for unnamed in folder.glob("latest.*.tmp"):
        unnamed.unlink()


def has_checkpoint(run_dir: str | Path) -> bool:
    """Whether a checkpoint was ever completed here, so that a resume must find one."""
    folder = Path(run_dir) / "checkpoints"
    replaced = any(folder.glob("step-*.old")) if folder.is_dir() else False
    return (folder / "latest").exists() or replaced or bool(saved_steps(folder))


def resume_candidates(run_dir: str | Path) -> tuple[list[Path], str | None]:
    """The checkpoints that a resume may go on from, best first, and what is wrong with `latest`.

    The first is what `latest` names; then come older ones, newest first. Newer ones belong to an
    abandoned continuation, or `latest` had not named them yet when the run crashed. Where `latest`
    is missing or names nothing, every finished checkpoint counts, newest first.
    """
    folder = Path(run_dir) / "checkpoints"
    restore_replaced(folder)
    steps = saved_steps(folder)
    # What `latest` names may be removed by hand, or damaged: it tells nothing of the others then.
    named, complaint = read_latest(folder)
    newest = max(steps, default=0) if named is None else named
    return [folder / f"step-{step}" for step in reversed(steps) if step <= newest], complaint


def read_latest(folder: Path) -> tuple[int | None, str | None]:
    """The step that `latest` names, or None and what is wrong with it."""
    latest = folder / "latest"
    try:
        name = latest.read_text(errors="replace").strip()
    except OSError as error:
        return None, f"{latest} cannot be read: {error.strerror}"
    match = _STEP_NAME.fullmatch(name)
    if match is None:
        return None, f"{latest} holds {name!r}, not the name of a checkpoint"
    if not (folder / name).is_dir():
        return None, f"{latest} names {name}, which is missing"
    return int(match[1]), None


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
            raise DamagedCheckpointError(f"checkpoint {path} is incomplete: it has no {missing[0]}")
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = saved_steps(folder)
    instead = f"; name one of its checkpoints, such as {folder}/step-{steps[-1]}" if steps else ""
    if not (folder / "latest").is_file():
        raise CheckpointError(f"no checkpoint in {folder}: it has no file 'latest'{instead}")
    step, complaint = read_latest(folder)
    if step is None:
        raise CheckpointError(f"{complaint}{instead}")
    return find_checkpoint(folder / f"step-{step}")


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, meta.json.

    Args:
        path: a run directory, its checkpoints/ folder, or one step-N directory.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    path = find_checkpoint(path) / "meta.json"
    if not (path.parent / MANIFEST).is_file():
        raise DamagedCheckpointError(
            f"checkpoint {path.parent} is incomplete: it has no {MANIFEST}"
        )
    try:
        if record_of(path) != read_manifest(path.parent).get("meta.json"):
            raise ValueError("its size or SHA-256 is not what was written")
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint file {path} is damaged: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} does not describe a {FORMAT}")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; sedd_scale {__version__} reads version "
            f"{FORMAT_VERSION}: install the release that wrote it"
        )
    missing = (META_KEYS | {"optimizer_step", "versions", "shapes"}) - set(meta)
    if missing:
        raise DamagedCheckpointError(
            f"checkpoint file {path} is damaged: no {', '.join(sorted(missing))}"
        )
    return meta


def saved_steps(folder: Path) -> list[int]:
    """Steps of the folder's finished checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = [_STEP_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    return sorted(int(match[1]) for match in matches if match)
