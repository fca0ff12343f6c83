"""The manifest of a checkpoint: size and SHA-256 of every file in it.

It is the last file written before the directory gets its final name. Whoever writes a file hashes
it, and whoever loads a checkpoint shares the hashing with the other ranks, so that neither takes
longer with more ranks.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sedd_scale.files.atomic import write_atomically

MANIFEST = "manifest.json"

_CHUNK = 1 << 22
_MOST_THREADS = 4


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


def record_of(path: Path) -> FileRecord:
    """Read a file and hash it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def write_manifest(directory: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """List every file of the directory; those not in `known`, by relative name, are hashed here."""
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = sorted({path.relative_to(directory).as_posix() for path in paths} - {MANIFEST})
    records = {name: known.get(name) or record_of(directory / name) for name in names}
    content = {"files": {name: asdict(record) for name, record in records.items()}}
    write_atomically(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())
    return records


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The files that a checkpoint must consist of, by relative name.

    Raises:
        ValueError: it is missing or no manifest.
    """
    try:
        content: Any = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: FileRecord(int(record["size"]), str(record["sha256"]))
            for name, record in content["files"].items()
        }
    except FileNotFoundError:
        raise ValueError(f"checkpoint {directory} is incomplete: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint file {directory / MANIFEST} is damaged: {error}") from error
    if not files:
        raise ValueError(f"checkpoint file {directory / MANIFEST} is damaged: it lists no files")
    return files


def first_wrong_size(directory: Path, files: Mapping[str, FileRecord]) -> str | None:
    """One line on the first file that is missing or has another size, or None."""
    for name, record in files.items():
        path = directory / name
        if not path.is_file():
            return f"checkpoint {directory} is incomplete: {name} is missing"
        size = path.stat().st_size
        if size < record.size:
            return f"checkpoint file {path} is cut short: {size} of {record.size} bytes"
        if size > record.size:
            return f"checkpoint file {path} is damaged: {size} bytes, {record.size} were written"
    return None


def first_wrong_hash(directory: Path, files: Mapping[str, FileRecord]) -> str | None:
    """One line on the first file whose content is not what was written, or None."""
    if not files:
        return None
    names = list(files)
    with ThreadPoolExecutor(min(len(names), _MOST_THREADS)) as pool:
        try:
            found = list(pool.map(lambda name: record_of(directory / name), names))
        except OSError as error:
            return f"checkpoint {directory} cannot be read: {error}"
    for name, record in zip(names, found, strict=True):
        if record != files[name]:
            return (
                f"checkpoint file {directory / name} is damaged: its SHA-256 is "
                f"{record.sha256[:12]}..., {files[name].sha256[:12]}... was written"
            )
    return None


def files_of_rank(
    files: Mapping[str, FileRecord], rank: int, num_ranks: int
) -> dict[str, FileRecord]:
    """This rank's part of the files to hash: the largest first, each to whom has least to read."""
    loads = [0] * num_ranks
    own: dict[str, FileRecord] = {}
    by_size: Sequence[str] = sorted(files, key=lambda name: (-files[name].size, name))
    for name in by_size:
        least = loads.index(min(loads))
        loads[least] += files[name].size
        if least == rank:
            own[name] = files[name]
    return own
