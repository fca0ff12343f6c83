"""What a preparation refuses before it begins, and which files are its own."""

import re
import shutil
from pathlib import Path

from sedd_scale.data.shards import INDEX_FILE
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.files.processors import available_cores
from sedd_scale.preparation.journal import JOURNAL_FILE, LOCK_FILE
from sedd_scale.preparation.packing import PACKINGS
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY
from sedd_scale.tokenizers.opening import KINDS

# In a block.
MOST_TOKENS = 2**27

_OURS = re.compile(
    r"(train|valid|test)-\d{6}\.tar(\.tmp)?|(index|unfinished)\.json(\.\d+\.tmp)?"
    r"|unfinished\.sqlite.*|unfinished\.lock"
)


def check_arguments(
    *,
    block_length: int,
    tokenizer: str,
    tokenizer_path: Path | None,
    valid_fraction: float,
    test_fraction: float,
    blocks_per_shard: int,
    tokenizer_sample: int,
    packing: str,
    processes: int | None,
) -> None:
    """Refuse arguments that do not go together; raises ConfigError."""
    for name, count in (
        ("--block-length", block_length),
        ("--blocks-per-shard", blocks_per_shard),
        ("--tokenizer-sample", tokenizer_sample),
        ("--processes", 1 if processes is None else processes),
    ):
        if count < 1:
            raise ConfigError(f"{name} {count} is not positive: give at least 1")
    if block_length > MOST_TOKENS:
        raise ConfigError(f"--block-length {block_length} is too large: give at most {MOST_TOKENS}")
    most = max(64, 4 * available_cores())
    if processes is not None and processes > most:
        raise ConfigError(f"--processes {processes} is too many here: give at most {most}")
    if tokenizer not in KINDS:
        raise ConfigError(f"--tokenizer {tokenizer} is unknown: give one of {', '.join(KINDS)}")
    if packing not in PACKINGS:
        raise ConfigError(f"--packing {packing} is unknown: give one of {', '.join(PACKINGS)}")
    if tokenizer == "gpt2" and tokenizer_path is None:
        raise ConfigError(
            "--tokenizer gpt2 needs --tokenizer-path: the directory of vocab.json and merges.txt"
        )
    if tokenizer in ("bytes", "text8") and tokenizer_path is not None:
        raise ConfigError(f"--tokenizer {tokenizer} has no files: leave --tokenizer-path out")
    for name, fraction in (("valid", valid_fraction), ("test", test_fraction)):
        if not 0 <= fraction < 1:
            raise ConfigError(f"--{name}-fraction {fraction} is not in [0, 1): give such as 0.02")
    if valid_fraction + test_fraction >= 1:
        raise ConfigError(
            f"--valid-fraction {valid_fraction} and --test-fraction {test_fraction} leave nothing "
            "to train on: give less than 1 together"
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
