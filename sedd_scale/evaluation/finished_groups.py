"""What a killed evaluation had finished, so that the same command goes on from there.

`evaluation.json` says which evaluation it is, and each process appends the groups of blocks that it
finished to a file of its own. A group's numbers depend on no other, so a result that was made in
several goes, or by another number of processes, is the same to the last digit.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.files.atomic import write_atomically

IDENTITY_FILE = "evaluation.json"


class FinishedGroups:
    """Groups of an evaluation that are done, kept in a directory; collective to create.

    Args:
        directory: made if it is not there.
        identity: all that a group's numbers depend on, of JSON's types.
        rank: of this process; the first one reads what is there, for all.
        writes: whether this process's groups are no other process's.

    Attributes:
        found: groups of earlier goes, by number.

    Raises:
        ConfigError: the directory holds another evaluation.
        DataError: it is damaged, or cannot be made.
    """

    def __init__(
        self, directory: Path, identity: Mapping[str, Any], *, rank: int = 0, writes: bool = True
    ) -> None:
        self.found: dict[int, tuple[Any, ...]] = {}
        self._path = directory / f"groups-{rank}.jsonl" if writes else None
        shared: list[Any] = [None]
        if rank == 0:
            # An error here ends this process, and its launcher the others.
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"--resume {directory} is no directory that can be made: {error.strerror}"
                ) from error
            _claim(directory, json.loads(json.dumps(identity)))
            shared = [_read_all(directory)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(shared, src=0)
        self.found = shared[0]

    def add(self, number: int, parts: Sequence[Any]) -> None:
        """Keep a group's arrays and numbers."""
        if self._path is None:
            return
        line = json.dumps({"group": number, "parts": [_encoded(part) for part in parts]})
        with self._path.open("ab") as stream:
            # A line that a killed process left unfinished stays alone.
            if stream.tell() and not _ends_in_newline(self._path):
                stream.write(b"\n")
            stream.write(line.encode() + b"\n")


def _claim(directory: Path, identity: dict[str, Any]) -> None:
    path = directory / IDENTITY_FILE
    if not path.is_file():
        write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
        return
    try:
        before = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove {directory} and evaluate again") from error
    other = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
    if other:
        raise ConfigError(
            f"--resume {directory} holds an evaluation with another {', '.join(sorted(other))}: "
            "give the same command to go on with it, or another directory"
        )


def _read_all(directory: Path) -> dict[int, tuple[Any, ...]]:
    found = {}
    for path in sorted(directory.glob("groups-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                found[int(record["group"])] = tuple(map(_decoded, record["parts"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut short when its process was killed: that group is made again
    return found


def _encoded(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(part, dtype="<f8").tobytes()).decode()
        return {"shape": part.shape, "float64": content}
    return part


def _decoded(part: Any) -> Any:
    if isinstance(part, dict):
        return np.frombuffer(base64.b64decode(part["float64"]), dtype="<f8").reshape(part["shape"])
    return part


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) == b"\n"
