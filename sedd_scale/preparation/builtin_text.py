"""Text that every Python installation carries, for a first run without a download.

The documents, in this order: each pydoc topic (the language reference); the docstrings of each
module of the standard library; the source of each module without those docstrings. Modules are read
as files, never imported, in sorted order. Left out: tests, installed packages, IDLE, and packages
that are mostly tables or data. The sum stops at 12 MB of UTF-8, and a file that is not UTF-8 or
does not parse is skipped. The text depends on the Python version and on nothing else.
"""

import ast
import functools
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from sedd_scale.errors import DataError

LARGEST_TOTAL_BYTES = 12_000_000
SMALLEST_DOCUMENT_CHARACTERS = 200

_LEFT_OUT = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "encodings",
    "ensurepip",
    "distutils",
    "lib-dynload",
}

_HALF_PAIR = re.compile("[\ud800-\udfff]")

_Commented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def builtin_python_documents() -> tuple[dict[str, str], ...]:
    """The documents as {"text": ...}, prose first; read once per process and kept.

    Raises:
        DataError: this Python carries neither topics nor sources (a stripped installation).
    """
    documents = []
    total = 0
    for text in _texts():
        if len(text) < SMALLEST_DOCUMENT_CHARACTERS:
            continue
        total += len(text.encode())
        if total > LARGEST_TOTAL_BYTES:
            break
        documents.append({"text": text})
    if not documents:
        raise DataError(
            "builtin:python finds no text: this Python has no sources of its standard library; "
            "give --input a file"
        )
    return tuple(documents)


def _texts() -> Iterator[str]:
    yield from _topics()
    modules = [_split(path) for path in _modules()]
    for docstrings, _ in modules:
        yield "\n\n".join(docstrings)
    for _, source in modules:
        yield source


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield topics[name].strip("\n") + "\n"


def _modules() -> Iterator[Path]:
    library = sysconfig.get_path("stdlib")
    for directory, names, files in os.walk(library):
        names[:] = sorted(name for name in names if name not in _LEFT_OUT)
        for file in sorted(files):
            if file.endswith(".py"):
                yield Path(directory, file)


def _split(path: Path) -> tuple[list[str], str]:
    """The docstrings of a module, in order, and its source without them."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return [], ""
    docstrings = []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _Commented):
            text = ast.get_docstring(node)
            # Half a pair, which an escape may spell, has no UTF-8.
            if text is not None and not _HALF_PAIR.search(text):
                expression = node.body[0]
                docstrings.append((expression.lineno, text))
                dropped.update(range(expression.lineno, (expression.end_lineno or 0) + 1))
    lines = source.split("\n")
    kept = [line for number, line in enumerate(lines, start=1) if number not in dropped]
    return [text for _, text in sorted(docstrings)], "\n".join(kept)
