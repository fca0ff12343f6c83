"""A checkpoint's fingerprint: which weights a number was measured with."""

import hashlib
from pathlib import Path

from sedd_scale.checkpoint.directory import find_checkpoint
from sedd_scale.checkpoint.manifest import read_manifest, record_of
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.formats import detect_format

_SUFFIXES = (".json", ".safetensors", ".bin", ".pth", ".ckpt")


def checkpoint_fingerprint(path: Path) -> str:
    """SHA-256 (hex) over name and SHA-256 of the checkpoint's files.

    Of a run: of its newest checkpoint, whose files were hashed when it was written. A converted
    copy is made of other files and has another fingerprint.

    Raises:
        CheckpointError: nothing readable there.
    """
    if path.is_dir() and detect_format(path) == "native":
        try:
            files = read_manifest(find_checkpoint(path))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    else:
        found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        files = {p.name: record_of(p) for p in found if p.suffix in _SUFFIXES}
    digest = hashlib.sha256()
    for name, record in sorted(files.items()):
        digest.update(f"{name}\0{record.sha256}\n".encode())
    return digest.hexdigest()
