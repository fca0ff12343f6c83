"""What unfinished work was begun with: only the same command may continue it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.files.atomic import write_atomically


def claim(path: Path, identity: Mapping[str, Any], *, holds: str, remedy: str) -> None:
    """Write `identity` as JSON to `path`, or find that it is the one there.

    Args:
        holds: what an error says of the folder, such as "--resume DIR holds an evaluation".
        remedy: what to do about another identity.

    Raises:
        ConfigError: the folder was begun with another identity; names what differs.
        DataError: the file is damaged.
    """
    content = json.dumps(identity, indent=1) + "\n"
    if not path.is_file():
        write_atomically(path, content.encode())
        return
    try:
        before = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove {path.parent} and start again") from error
    refuse_another(before, json.loads(content), holds=holds, remedy=remedy)


def refuse_another(
    before: Mapping[str, Any], now: Mapping[str, Any], *, holds: str, remedy: str
) -> None:
    """Raise ConfigError where an entry of one mapping is not that of the other."""
    other = [
        name if isinstance(after, list | dict) else f"{name} ({before.get(name)}, now {after})"
        for name in {**before, **now}
        if before.get(name) != (after := now.get(name))
    ]
    if other:
        raise ConfigError(f"{holds} with another {', '.join(other)}: {remedy}")
