"""Checkpoints of this and other programs, read and written."""

from typing import NamedTuple


class Format(NamedTuple):
    """What there is to know of a format before a file is opened.

    Attributes:
        about: its files, for a help text.
        says_all: whether its files describe their model by themselves.
        options: of `convert` that its writer takes; None: it is read only.
    """

    about: str
    says_all: bool
    options: tuple[str, ...] | None


FORMATS = {
    "native": Format(
        "a run directory of sedd-scale train, or one of its checkpoints/step-N", True, ()
    ),
    "sedd-hf": Format(
        "a directory in the published SEDD format: config.json with model.safetensors,\n"
        "shards and model.safetensors.index.json, or pytorch_model.bin",
        True,
        ("shard_gb", "results"),
    ),
    "sedd-train": Format(
        "checkpoint.pth of the authors' training program", False, ("noise_parameters",)
    ),
    "mdlm": Format(
        "MDLM, Duo and other weights under SEDD's names: a Lightning .ckpt, a .safetensors,\n"
        ".pth, .pt or .bin file, shards and their index, or a directory (read only)",
        False,
        None,
    ),
}
"""Every format by its name."""

TARGETS = tuple(name for name, row in FORMATS.items() if row.options is not None)
