"""Which format a checkpoint has, and its opening."""

from pathlib import Path

from sedd_scale.checkpoint.directory import is_ours
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import CheckpointSource
from sedd_scale.interop.mdlm import PREFIX, MdlmSource
from sedd_scale.interop.native import NativeSource
from sedd_scale.interop.pickled_files import PickledFile
from sedd_scale.interop.reference_training import FILE_NAME, ReferenceTrainingSource
from sedd_scale.interop.safetensors_files import INDEX_FILE, SINGLE_FILE
from sedd_scale.interop.sedd_directory import (
    CONFIG_FILE,
    PICKLED_FILE,
    PublishedSource,
    open_named_tensors,
)

FORMATS = ("native", "sedd-hf", "sedd-train", "mdlm")
# These say everything themselves.
SELF_DESCRIBED = ("native", "sedd-hf")


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
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint")
    found = detect_format(path)
    if format is not None and format != found:
        raise CheckpointError(f"{path} has format {found}, not {format}: use --from {found}")
    given = [] if assumptions is None else assumptions.given()
    if given and found in SELF_DESCRIBED:
        raise CheckpointError(
            f"{path} ({found}) says itself what its {given[0].replace('_', ' ')} is: leave that "
            "option out"
        )
    if found == "native":
        return NativeSource(path, verify=verify)
    if found == "sedd-hf":
        return PublishedSource(path)
    if found == "sedd-train":
        return ReferenceTrainingSource(path, assumptions)
    return MdlmSource(path, assumptions)


def detect_format(path: Path) -> str:
    """One of `FORMATS`, by the names of files and of the tensors in them.

    Raises:
        CheckpointError: it looks like none of them.
    """
    if is_ours(path):
        return "native"
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            return "sedd-train"
        has_weights = any(
            (path / name).exists() for name in (SINGLE_FILE, INDEX_FILE, PICKLED_FILE)
        )
        if has_weights or (path / CONFIG_FILE).exists():
            if has_weights and _is_prefixed(open_named_tensors(path).shapes):
                return "mdlm"
            return "sedd-hf"
        return "native"
    if path.suffix == ".safetensors":
        return "mdlm"
    tree = PickledFile(path).tree
    if isinstance(tree, dict):
        if "state_dict" in tree or _is_prefixed(tree):
            return "mdlm"
        if "model" in tree or "ema" in tree:
            return "sedd-train"
        if "vocab_embed.embedding" in tree:
            raise CheckpointError(
                f"{path} is a state dict without config.json: put both into one directory, as "
                f"{PICKLED_FILE} and {CONFIG_FILE}, and give that"
            )
    raise CheckpointError(
        f"{path} is not a checkpoint of a known format: it is neither a directory nor a file with "
        f"model and ema, or with names that begin with {PREFIX}"
    )


def _is_prefixed(names: object) -> bool:
    return isinstance(names, dict) and any(str(name).startswith(PREFIX) for name in names)
