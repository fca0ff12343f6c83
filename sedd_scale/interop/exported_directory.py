"""Directories that transformers loads by itself, with the program of the network in them.

    AutoModelForMaskedLM.from_pretrained(DIR, trust_remote_code=True)

Weights have our names, so that a directory is read back as what was written.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.checkpoint.reading import check_tensors
from sedd_scale.config import Config, config_from_dict
from sedd_scale.config.sections import NETWORK
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.objectives import make_objective
from sedd_scale.diffusion.row_law import (
    AbsorbScores,
    CrossEntropy,
    ScaledAbsorbScores,
    UniformMean,
    UniformScores,
    law_of,
)
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import (
    CheckpointSource,
    Description,
    FileSource,
    model_shapes,
)
from sedd_scale.interop.foreign_files import CONFIG_FILE, CheckpointFiles, open_tensors
from sedd_scale.interop.huggingface import tokenizer_beside, write_tokenizer
from sedd_scale.interop.model_card import CARD_FILE
from sedd_scale.interop.safetensors_files import DEFAULT_SHARD_BYTES, write_safetensors
from sedd_scale.tokenizers.opening import open_tokenizer

MODEL_TYPE = "sedd_scale"
PROGRAM = Path(__file__).parent / "exported" / "modeling_sedd_scale.py"
_CLASSES = {"AutoConfig": "SeddScaleConfig", "AutoModelForMaskedLM": "SeddScaleForMaskedLM"}
# What the program calls the meaning of a row of logits.
_LAWS = {
    AbsorbScores: "scores",
    UniformScores: "scores",
    ScaledAbsorbScores: "scaled",
    CrossEntropy: "normalised",
    UniformMean: "mean",
}


def exported_config(described: Description) -> dict[str, Any]:
    """What config.json says of a model.

    Raises:
        CheckpointError: the program has no words for it.
    """
    config, objective = described.config, make_objective(described.config)
    if objective.causal:
        raise CheckpointError(
            f"training.objective={objective.name} is no diffusion model: use --to hf-causal"
        )
    if described.block_length is None:
        raise CheckpointError("the checkpoint does not name its block length")
    graph = make_graph(config.graph.name, described.num_tokens)
    law = law_of(config, graph, cross_entropy=objective.cross_entropy)
    keys = (key.name for key in fields(config.model) if key.metadata["shared"] == NETWORK)
    noise = config.to_dict()["noise"]
    return {
        "architectures": [_CLASSES["AutoModelForMaskedLM"]],
        "auto_map": {auto: f"{PROGRAM.stem}.{name}" for auto, name in _CLASSES.items()},
        "block_length": described.block_length,
        "dtype": "float32",
        "graph": config.graph.name,
        "law": _LAWS[type(law)],
        "model_type": MODEL_TYPE,
        "noise": noise,
        "num_tokens": described.num_tokens,
        "objective": objective.name,
        "shift": config.training.shift,
        "time_conditioning": config.model.time_conditioning,
        "trunk": {key: getattr(config.model, key) for key in keys},
    }


def write_exported(
    directory: Path,
    source: CheckpointSource,
    card: Callable[[], str],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write config.json, the program, the averaged weights, the tokenizer and a card.

    Args:
        directory: new.
        card: gives the text of README.md, of a model that can be written.
        shard_bytes: largest size of one file's tensors.

    Raises:
        CheckpointError: the program has no words for the model.
    """
    about = exported_config(source.described)
    card_text = card()
    directory.mkdir()
    if source.described.tokenizer_directory is not None:
        tokenizer = open_tokenizer(source.described.tokenizer_directory)
        about |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
        write_tokenizer(tokenizer, directory)
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    shutil.copyfile(PROGRAM, directory / PROGRAM.name)

    def read(name: str) -> Tensor:
        return source.read(name, "ema")

    write_safetensors(directory, source.shapes, read, shard_bytes=shard_bytes)
    (directory / CARD_FILE).write_text(card_text, encoding="utf-8")


class ExportedSource(FileSource):
    """What `write_exported` wrote."""

    format = "hf"

    def __init__(self, files: CheckpointFiles, assumptions: Assumptions) -> None:
        self.path, self.holds = files.path, frozenset({"ema"})
        raw = files.config
        try:
            config = _config_of(raw)
        except (ConfigError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path / CONFIG_FILE} is not what sedd_scale writes ({error}): restore it"
            ) from None
        self.described = Description(
            config=config,
            block_length=config.data.block_length,
            tokenizer_directory=tokenizer_beside(self.path, config.model.vocab_size or 0),
        )
        self._entries = open_tensors(files)
        found = {name: entry.shape for name, entry in self._entries.items()}
        check_tensors(self.path, model_shapes(config), found)

    @staticmethod
    def claims(files: CheckpointFiles) -> bool:
        """Whether its config.json says so."""
        return files.config.get("model_type") == MODEL_TYPE

    def _read(self, name: str, key: str) -> Tensor:
        return self._entries[name].read()

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the files have them."""
        return [entry[:4] for entry in self._entries.values()]


def _config_of(raw: Mapping[str, Any]) -> Config:
    config = config_from_dict(
        {
            "model": {**raw["trunk"], "vocab_size": raw["num_tokens"]},
            "graph": {"name": raw["graph"]},
            "noise": raw["noise"],
            "data": {"block_length": raw["block_length"]},
            "training": {"objective": raw["objective"], "shift": raw["shift"]},
        }
    )
    config.validate()
    return config
