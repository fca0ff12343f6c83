"""Which format a checkpoint has, and its opening."""

from pathlib import Path

from sedd_scale.checkpoint.directory import is_ours, warn_once
from sedd_scale.errors import CheckpointError
from sedd_scale.interop import FORMATS
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import CheckpointSource
from sedd_scale.interop.foreign_config import is_published
from sedd_scale.interop.foreign_files import (
    CONFIG_FILE,
    STANDARD_FILES,
    described_path,
    is_safetensors,
    read_json,
    weights_file,
)
from sedd_scale.interop.foreign_source import ForeignSource
from sedd_scale.interop.native import NativeSource
from sedd_scale.interop.pickled_files import PickledFile
from sedd_scale.interop.reference_training import ReferenceTrainingSource

# These say everything themselves.
SELF_DESCRIBED = tuple(name for name, row in FORMATS.items() if row.says_all)


def open_checkpoint(
    path: str | Path,
    *,
    format: str | None = None,
    assumptions: Assumptions | None = None,
    verify: bool = True,
) -> CheckpointSource:
    """Open a checkpoint of any format and find it complete; no weights are read yet.

    Args:
        format: of `FORMATS`; None: what the files look like.
        assumptions: what the file does not say; only for sedd-train and mdlm.
        verify: hash every file of a checkpoint of ours first; sizes are always compared.

    Raises:
        CheckpointError: nothing there, another format, or not exactly the model it describes.
    """
    path = Path(path)
    found = detect_format(path)
    if format is not None and format != found:
        raise CheckpointError(f"{path} has format {found}, not {format}: use --from {found}")
    assumptions = assumptions or Assumptions()
    if found in SELF_DESCRIBED and (given := assumptions.given()):
        raise CheckpointError(
            f"{path} ({found}) says itself what its {given[0].replace('_', ' ')} is: leave "
            f"{assumptions.spelled(**{given[0]: None})} out"
        )
    if found == "native":
        return NativeSource(path, verify=verify)
    path = described_path(path)
    source: CheckpointSource
    if found == "sedd-train":
        source = ReferenceTrainingSource(path, assumptions)
    else:
        source = ForeignSource(path, found, assumptions)
    if source.described.assumed:
        values = assumptions.spelled(**source.described.assumed)
        warn_once(f"note: {path} does not say all of itself; assumed is {values}")
    return source


def detect_format(path: Path) -> str:
    """One of `FORMATS`, by the names of files and of the tensors in them.

    Raises:
        CheckpointError: it looks like none of them, or like two.
    """
    path = described_path(path)
    if not path.exists() and not is_ours(path):
        raise CheckpointError(f"{path} does not exist; give a checkpoint")
    if is_ours(path):
        if path.is_dir() and any((path / name).exists() for name in STANDARD_FILES):
            raise CheckpointError(
                f"{path} holds a run and weights of another format: name one of them, as "
                f"{path}/checkpoints or in a directory of its own"
            )
        return "native"
    raw = read_json(path / CONFIG_FILE) if path.is_dir() else {}
    if is_published(raw):
        return "sedd-hf"
    file = weights_file(path)
    if file.name.endswith(".index.json") or is_safetensors(file):
        return "mdlm"
    tree = PickledFile(file).tree
    if not isinstance(tree, dict) or "model" not in tree or "state_dict" in tree:
        return "mdlm"
    # The authors' averages have no names. Without any it is theirs, cut short.
    ema = tree.get("ema")
    is_theirs = "shadow_params" in ema if isinstance(ema, dict) else {"optimizer", "step"} & {*tree}
    return "sedd-train" if is_theirs else "mdlm"
