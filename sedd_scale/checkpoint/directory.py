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
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sedd_scale.checkpoint import fault_points
from sedd_scale.checkpoint.manifest import MANIFEST, first_wrong_size, read_manifest, record_of
from sedd_scale.errors import CheckpointError, DamagedCheckpointError
from sedd_scale.files.atomic import sync_to_disk, write_atomically
from sedd_scale.version import __version__, versions

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

_STEP_NAME = re.compile(r"step-([0-9]{1,18})")
# Names of directories that are not whole, or not for long.
_UNFINISHED = re.compile(r"step-\d+\.(tmp|purge)")
_PARTS = (".metadata", "meta.json", MANIFEST)
T = TypeVar("T")


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
    return (folder / "latest").exists() or bool(_finished(folder))


def _finished(folder: Path) -> dict[int, Path]:
    """Finished checkpoints by step; what a crash left between two renames is read as step-N.old."""
    there = {step: folder / f"step-{step}" for step in saved_steps(folder)}
    for old in folder.glob("step-*.old"):
        if match := _STEP_NAME.fullmatch(old.stem):
            there.setdefault(int(match[1]), old)
    return there


def resume_candidates(run_dir: str | Path) -> tuple[list[Path], str | None]:
    """The checkpoints that a resume may go on from, best first, and what is wrong with `latest`.

    The first is what `latest` names; then come older ones, newest first: newer ones belong to an
    abandoned continuation, or to a crash before `latest` named them. Where `latest` names nothing,
    every finished checkpoint counts.
    """
    folder = _folder_of(Path(run_dir))
    there = _finished(folder)
    # What `latest` names may be removed by hand, or damaged: it tells nothing of the others then.
    named, complaint = _read_latest(folder, there)
    newest = max(there, default=0) if named is None else named
    return [there[step] for step in sorted(there, reverse=True) if step <= newest], complaint


def first_good(
    run_dir: str | Path, candidates: Iterable[Path], complaint: str | None, use: Callable[[Path], T]
) -> tuple[Path, T, list[str]]:
    """The first of a run's candidates that `use` does not find damaged.

    Returns its directory, what `use` made of it, and a line on everything that was passed over.

    Raises:
        CheckpointError: naming what is wrong with each, where none is good; or as `use` does.
    """
    failures = [complaint] if complaint else []
    for path in candidates:
        try:
            return path, use(path), failures
        except DamagedCheckpointError as error:
            failures.append(str(error))
    folder = _folder_of(Path(run_dir))
    if not failures:
        raise CheckpointError(f"no checkpoint in {folder}: it has no directory step-N")
    raise CheckpointError(
        f"no good checkpoint in {folder}: {'; '.join(failures)}; restore one from a copy, or start "
        "anew with another --run-dir"
    )


def newest_whole(run_dir: str | Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint that a run goes on from, as far as names and sizes of files tell.

    Returns its directory, its meta.json, and a line on everything that was passed over.

    Raises:
        CheckpointError: there is none.
    """

    def use(path: Path) -> dict[str, Any]:
        meta = read_meta(path)
        wrong = first_wrong_size(path, read_manifest(path))
        if wrong is not None:
            raise DamagedCheckpointError(wrong)
        return meta

    return first_good(run_dir, *resume_candidates(run_dir), use)


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory is one checkpoint, be it damaged, and not a run or a run's folder."""
    if (path / "checkpoints").is_dir() or saved_steps(path):
        return False
    is_named = _STEP_NAME.fullmatch(path.name.removesuffix(".old")) is not None
    is_run = (path / "config.yaml").exists()  # one that has saved nothing yet
    return any((path / name).exists() for name in _PARTS) or (is_named and not is_run)


def _folder_of(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _read_latest(folder: Path, there: Iterable[int]) -> tuple[int | None, str | None]:
    """The step that `latest` names, or None and what is wrong with it."""
    latest = folder / "latest"
    name = _named_by(latest)
    if name is None:  # where nothing was ever saved, its absence tells nothing
        return None, f"{latest} cannot be read: there is no such file" if there else None
    match = _STEP_NAME.fullmatch(name)
    if match is None:
        return None, f"{latest} holds {name[:40]!r}, not the name of a checkpoint"
    if int(match[1]) not in there:
        return None, f"{latest} names {match[0]}, which is missing"
    return int(match[1]), None


def _named_by(latest: Path) -> str | None:
    """What `latest`, a file of ours or a link that somebody set, names; None where it is not."""
    if latest.is_dir():
        return latest.resolve().name
    try:
        return latest.read_text(errors="replace").strip()
    except OSError as error:
        return None if isinstance(error, FileNotFoundError) else ""


def find_checkpoint(path: str | Path) -> Path:
    """The directory of the checkpoint that `path` means, by what is in it, whatever its name.

    Where `latest` names none, or one that is not whole, the newest whole one is meant; a warning
    says so.

    Args:
        path: a run directory, its checkpoints/ folder, `latest` in that, or one checkpoint.

    Raises:
        CheckpointError: naming what is missing.
    """
    path = Path(path)
    if path.name == "latest" and not path.is_dir() and is_ours(path):
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: there is no such directory")
    if _is_checkpoint(path):
        if _UNFINISHED.fullmatch(path.name):
            raise CheckpointError(f"{path} is no checkpoint: its writing or removal was cut short")
        if not _STEP_NAME.match(path.name) and not (path / "meta.json").exists():
            raise CheckpointError(
                f"{path} is a checkpoint of another program: make a file of it with `python -m "
                "torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY FILE`, and give "
                "that"
            )
        for name in _PARTS:
            if not (path / name).is_file():
                raise DamagedCheckpointError(f"checkpoint {path} is incomplete: it has no {name}")
        return path
    found, _, passed_over = newest_whole(path)
    for failure in passed_over:
        warn_once(f"warning: {failure}; {found} is read instead")
    return found


def run_of(path: Path) -> Path:
    """The run directory that `path` means: itself, or what its checkpoints/ folder lies in.

    Args:
        path: what `find_checkpoint` takes.
    """
    if not is_ours(path) or (path / "checkpoints").is_dir():
        return path
    found = path.resolve()
    if not found.is_dir() or _is_checkpoint(found):
        found = found.parent
    return found.parent if found.name == "checkpoints" else path


def is_ours(path: Path) -> bool:
    """Whether `path` is a run directory, its folder of checkpoints, `latest` or a checkpoint."""
    if not path.is_dir():
        return path.name == "latest" and bool(saved_steps(path.parent))
    if _is_checkpoint(path):
        return True
    folder = _folder_of(path)
    if _finished(folder):
        return True
    # DeepSpeed has such a file too, which names a folder of its own.
    named = _named_by(folder / "latest")
    return named is not None and not (named and (folder / named).exists())


@functools.cache
def warn_once(line: str) -> None:
    """Say a line on stderr, on the first process and the first time."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, meta.json.

    Args:
        path: what `find_checkpoint` takes.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    path = find_checkpoint(path) / "meta.json"
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


def meta_text(meta: Mapping[str, Any], *, optimizer_step: int, shapes: Any) -> str:
    """What meta.json says of a run's state: `META_KEYS` and more, beside how it was written."""
    assert set(meta) >= META_KEYS, META_KEYS - set(meta)
    own = {"format": FORMAT, "format_version": FORMAT_VERSION, "versions": versions()}
    return json.dumps({**own, **meta, "optimizer_step": optimizer_step, "shapes": shapes}, indent=1)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the folder's finished checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = [_STEP_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()]
    # A run directory may have any name, such as step-2.
    steps = [int(match[1]) for match in matches if match]
    return sorted(step for step in steps if not (folder / f"step-{step}" / "checkpoints").exists())
