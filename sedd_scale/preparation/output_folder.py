"""Which files of a directory are a preparation's own; a directory with others is refused."""

import re
import shutil
from pathlib import Path

from sedd_scale.data.shards import INDEX_FILE
from sedd_scale.errors import DataError
from sedd_scale.preparation.journal import JOURNAL_FILE, LOCK_FILE
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY

_OURS = re.compile(
    r"(train|valid|test)-\d{6}\.tar(\.tmp)?|(index|unfinished)\.json(\.\d+\.tmp)?"
    r"|unfinished\.sqlite.*|unfinished\.lock"
)


def check_output(output: Path) -> None:
    """Refuse a directory with a dataset or with anything else; raises DataError."""
    if not output.exists():
        return
    if not output.is_dir():
        raise DataError(f"--output {output} is a file: give a directory")
    if (output / INDEX_FILE).exists():
        raise DataError(
            f"--output {output} already holds a dataset; give another --output or remove it"
        )
    names = sorted(entry.name for entry in output.iterdir())
    if JOURNAL_FILE in names and TOKENIZER_DIRECTORY in names:
        names.remove(TOKENIZER_DIRECTORY)
    for name in names:
        if _OURS.fullmatch(name) is None:
            raise DataError(
                f"--output {output} is not empty (it holds {name}); give a new directory"
            )


def remove_preparation(output: Path) -> None:
    """Remove every file that a preparation writes, but for its lock."""
    for entry in output.iterdir():
        if _OURS.fullmatch(entry.name) is not None and entry.name != LOCK_FILE:
            entry.unlink()
    shutil.rmtree(output / TOKENIZER_DIRECTORY, ignore_errors=True)
