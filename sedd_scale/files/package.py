"""This program's own files, in a checkout and in an installation alike."""

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE / "configs"


def checkout() -> Path | None:
    """The repository that the package runs from; None where it is installed."""
    return PACKAGE.parent if (PACKAGE.parent / "setup.py").is_file() else None


def own_files(*suffixes: str) -> Iterator[Path]:
    """The program's files with these endings, in order, through the links of a checkout."""
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def command(name: str) -> list[str]:
    """The words that run one of the commands in another process; with `environment_for`."""
    return [sys.executable, "-m", "sedd_scale", name]


def environment_for(given: Mapping[str, str]) -> dict[str, str]:
    """Variables under which another process imports this very package."""
    paths = filter(None, [str(PACKAGE.parent), given.get("PYTHONPATH")])
    return {**given, "PYTHONPATH": os.pathsep.join(paths)}
