"""Checkpoints of this and other programs, read and written."""

import pkgutil
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sedd_scale.interop.checkpoint_source import FileSource


class Format(NamedTuple):
    """What there is to know of a format before a file is opened.

    Attributes:
        reader: module and class here, a `FileSource`; imported when a file is opened.
        about: its files, for a help text.
        says_all: whether its files describe their model by themselves.
        options: of `convert` that its writer takes; None: it is read only.
    """

    reader: str
    about: str
    says_all: bool
    options: tuple[str, ...] | None

    @property
    def source(self) -> "type[FileSource]":
        """The class that opens its files."""
        found: type[FileSource] = pkgutil.resolve_name(f"{__name__}.{self.reader}")
        return found


FORMATS = {
    "native": Format(
        "native:NativeSource",
        "a run directory of sedd-scale train, or one of its checkpoints/step-N",
        True,
        (),
    ),
    "sedd-hf": Format(
        "foreign_source:PublishedSource",
        "a directory in the published SEDD format: config.json with model.safetensors,\n"
        "shards and model.safetensors.index.json, or pytorch_model.bin",
        True,
        ("shard_gb", "results"),
    ),
    "hf": Format(
        "exported_directory:ExportedSource",
        "a model of ours for transformers, with the program of its network: what --to hf wrote",
        True,
        ("shard_gb", "results"),
    ),
    "hf-causal": Format(
        "huggingface:HuggingFaceSource",
        "an autoregressive model of transformers: the directory of its config.json, weights and\n"
        "tokenizer; GPT-2, Llama, Mistral, Qwen2 and Qwen3",
        True,
        ("shard_gb",),
    ),
    "sedd-train": Format(
        "reference_training:ReferenceTrainingSource",
        "checkpoint.pth of the authors' training program",
        False,
        ("noise_parameters",),
    ),
    "mdlm": Format(
        "foreign_source:ForeignSource",
        "MDLM, Duo and other weights under SEDD's names: a Lightning .ckpt, a .safetensors,\n"
        ".pth, .pt or .bin file, shards and their index, or a directory (read only)",
        False,
        None,
    ),
}
"""Every format by its name; a checkpoint is of the first whose reader claims it."""

TARGETS = {name: row.options for name, row in FORMATS.items() if row.options is not None}
"""What is written, and the options of `convert` that its writer takes."""
