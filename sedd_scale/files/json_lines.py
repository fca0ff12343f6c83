"""Files of JSON lines that a process may be writing, or was killed while it wrote."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one per line; none where there is no file.

    What is no whole object is passed over: the last line may be in the making, and a crash leaves
    one cut short.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
