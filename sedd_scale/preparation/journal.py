"""What a killed preparation left, so that the same command continues where it ended.

The journal says how far the input was read and what the writers had made durable then. Everything
after it is cut off and made again, so that the result has the same bytes as an undisturbed one.
"""

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedd_scale.errors import DataError
from sedd_scale.files.atomic import write_atomically
from sedd_scale.files.identity import refuse_another

JOURNAL_FILE = "unfinished.json"
SEEN_FILE = "unfinished.sqlite"
LOCK_FILE = "unfinished.lock"


def write_journal(directory: Path, *, command: dict[str, Any], state: dict[str, Any]) -> None:
    """Replace the journal of a preparation by its present state."""
    content = json.dumps({"command": command, "state": state})
    write_atomically(directory / JOURNAL_FILE, content.encode())


def read_journal(directory: Path, command: dict[str, Any]) -> dict[str, Any] | None:
    """The state that a killed run of this command left, or None for a fresh start.

    Raises:
        ConfigError: the directory holds what another command left unfinished.
        DataError: the journal is damaged.
    """
    path = directory / JOURNAL_FILE
    if not path.is_file():
        return None
    try:
        journal = json.loads(path.read_bytes())
        before, state = journal["command"], journal["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove {directory} and prepare again") from error
    refuse_another(
        {key: before.get(key) for key in command},
        command,
        holds=f"--output {directory} holds an unfinished preparation",
        remedy="give the same command to continue it, or remove it",
    )
    assert isinstance(state, dict)
    return state


def remove_journal(directory: Path) -> None:
    """Remove the journal, the table of seen documents and the lock."""
    for name in (JOURNAL_FILE, SEEN_FILE, LOCK_FILE):
        for path in directory.glob(name + "*"):
            path.unlink()


class SeenDocuments:
    """Which documents came before, on disk, so that memory does not grow with the corpus.

    A row is the first half of a document's SHA-256 and the document's number in the input; rows
    later than the journal are forgotten when a preparation is continued.

    Args:
        directory: of the dataset.
        documents: how many documents the journal has passed; 0: a fresh start.
    """

    def __init__(self, directory: Path, *, documents: int) -> None:
        path = directory / SEEN_FILE
        if documents == 0:
            path.unlink(missing_ok=True)
        self._connection = sqlite3.connect(path)
        self._connection.execute("pragma cache_size = -65536")  # KiB
        self._connection.execute(
            "create table if not exists seen (digest blob primary key, number integer) "
            "without rowid"
        )
        self._connection.execute("delete from seen where number >= ?", (documents,))
        self._number = documents

    def first_seen(self, digests: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Whether each document is the first with its text; they count as seen from now on."""
        add = "insert or ignore into seen values (?, ?)"
        first = []
        for digest in digests:
            cursor = self._connection.execute(add, (digest[:16], self._number))
            first.append(cursor.rowcount == 1)
            self._number += 1
        return np.array(first, dtype=np.bool_)

    def commit(self) -> None:
        """Make what was seen durable; call before the journal is written."""
        self._connection.commit()

    def close(self) -> None:
        """Close the table, keeping the file."""
        self._connection.close()
