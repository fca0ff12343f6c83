"""Which format a checkpoint has, and its opening."""

from pathlib import Path

from sedd_scale.checkpoint.directory import warn_once
from sedd_scale.errors import CheckpointError
from sedd_scale.interop import FORMATS
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import FileSource
from sedd_scale.interop.foreign_files import CONFIG_FILE, CheckpointFiles


def open_checkpoint(
    path: str | Path | CheckpointFiles,
    *,
    format: str | None = None,
    assumptions: Assumptions | None = None,
) -> FileSource:
    """Open a checkpoint of any format and find it complete; no weights are read yet.

    Args:
        format: of `FORMATS`; None: what the files look like.
        assumptions: what the file does not say; only for formats that do not say all.

    Raises:
        CheckpointError: nothing there, another format, or not exactly the model it describes.
    """
    files = path if isinstance(path, CheckpointFiles) else CheckpointFiles(path)
    found = detect_format(files)
    # As in hf, which hf-causal is too.
    if format is not None and format != found and not found.startswith(f"{format}-"):
        if found == "mdlm" and format.startswith("hf"):  # which anything else looks like
            raise CheckpointError(
                f"{files.named} has no {CONFIG_FILE} of a language model of transformers: fetch "
                f"it, or use --from {found} for weights under SEDD's names"
            )
        raise CheckpointError(f"{files.named} has format {found}, not {format}: use --from {found}")
    assumptions = assumptions or Assumptions()
    row = FORMATS[found]
    if row.says_all and (given := assumptions.given()):
        raise CheckpointError(
            f"{files.named} ({found}) says itself what its {given[0].replace('_', ' ')} is: leave "
            f"{assumptions.spelled(**{given[0]: None})} out"
        )
    source = row.source(files, assumptions)
    if source.described.assumed:
        values = assumptions.spelled(**source.described.assumed)
        warn_once(f"note: {files.path} does not say all of itself; assumed is {values}")
    return source


def detect_format(path: Path | CheckpointFiles) -> str:
    """One of `FORMATS`, by the names of files and of the tensors in them.

    Raises:
        CheckpointError: it looks like none of them, or like two.
    """
    files = path if isinstance(path, CheckpointFiles) else CheckpointFiles(path)
    return next(name for name, row in FORMATS.items() if row.source.claims(files))
