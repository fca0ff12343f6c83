"""What a killed evaluation had finished, so that the same command continues from there.

`evaluation.json` says which evaluation it is, and each process appends the groups of blocks that it
finished to a file of its own. A group's numbers depend on no other, so a result that was made in
several goes, or by another number of processes, is the same to the last digit.
"""

import base64
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sedd_scale.errors import DataError
from sedd_scale.files.identity import claim
from sedd_scale.files.json_lines import read_json_lines
from sedd_scale.parallel.agreement import from_first

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
        self._path = directory / f"groups-{rank}.jsonl" if writes else None

        def read() -> dict[int, tuple[Any, ...]]:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(
                    f"--resume {directory} is not a directory that can be made: {error.strerror}"
                ) from error
            claim(
                directory / IDENTITY_FILE,
                identity,
                holds=f"--resume {directory} holds an evaluation",
                remedy="give the same command to continue it, or another directory",
            )
            return _read_all(directory)

        self.found = from_first(read)

    def add(self, number: int, parts: Sequence[Any]) -> None:
        """Keep a group's arrays and numbers."""
        if self._path is None:
            return
        line = json.dumps({"group": number, "parts": [_encoded(part) for part in parts]})
        with self._path.open("ab") as stream:
            # The newline in front ends a line that a killed process left unfinished.
            stream.write(b"\n" + line.encode())


def _read_all(directory: Path) -> dict[int, tuple[Any, ...]]:
    found = {}
    for path in sorted(directory.glob("groups-*.jsonl")):
        for record in read_json_lines(path):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: is made again
                found[int(record["group"])] = tuple(map(_decoded, record["parts"]))
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
