"""A checkpoint's fingerprint: which weights a number was measured with, or samples drawn with."""

import hashlib
from pathlib import Path

from sedd_scale.checkpoint.directory import find_checkpoint
from sedd_scale.checkpoint.manifest import read_manifest, record_of
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.foreign_files import weights_file
from sedd_scale.interop.formats import detect_format

_SUFFIXES = (".json", ".safetensors", ".bin", ".pth", ".pt", ".ckpt")
# Of each end of a file.
_DIGEST_BYTES = 1 << 16


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 (hex) over name and SHA-256 of the checkpoint's files; of a run, of its newest's.

    Raises:
        CheckpointError: nothing readable there.
    """
    if detect_format(path) == "native":
        try:
            files = read_manifest(find_checkpoint(path))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    elif path.is_file():
        files = {path.name: record_of(path)}
    else:
        found = {p for p in path.iterdir() if p.suffix in _SUFFIXES} | {weights_file(path)}
        files = {p.relative_to(path).as_posix(): record_of(p) for p in found}
    digest = hashlib.sha256()
    for name, record in sorted(files.items()):
        digest.update(f"{name}\0{record.sha256}\n".encode())
    return digest.hexdigest()


def checkpoint_digest(path: Path) -> str:
    """A quick fingerprint (hex): names and sizes of the files, and both ends of each.

    Raises:
        CheckpointError: no checkpoint is there.
    """
    directory = find_checkpoint(path) if detect_format(path) == "native" else path
    files = sorted(directory.rglob("*")) if directory.is_dir() else [directory]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(directory)}\0{size}\0".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_DIGEST_BYTES))
                stream.seek(max(0, size - _DIGEST_BYTES))
                digest.update(stream.read(_DIGEST_BYTES))
    return digest.hexdigest()
