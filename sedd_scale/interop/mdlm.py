"""Checkpoints of MDLM (arXiv 2406.07524) and Duo (arXiv 2506.10892): the SEDD names, prefixed.

Their networks are SEDD's, under `backbone.`, in a Lightning checkpoint (`state_dict`, maybe `ema`)
or in safetensors. Their outputs are logits of a distribution over clean tokens.

Of absorb (MDLM) these are scaled log-scores up to the constant that a softmax divides out: a
network of `training.objective=masked_cross_entropy`, whose bound is the one that MDLM reports.

Of uniform (Duo, UDLM) scores follow from them: `model.parametrisation=mean`, whose score entropy
is the bound that both report.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from sedd_scale.diffusion.objectives import MaskedCrossEntropy
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import (
    CheckpointSource,
    Description,
    Shape,
    check_tensors,
)
from sedd_scale.interop.foreign_shapes import config_of_shapes
from sedd_scale.interop.pickled_files import PickledFile
from sedd_scale.interop.reference_training import parameter_order, shadow_parameters
from sedd_scale.interop.safetensors_files import SafetensorsFiles
from sedd_scale.interop.sedd_directory import (
    CONFIG_FILE,
    NamedTensors,
    describe,
    open_named_tensors,
    published_shapes,
    without_buffer,
)
from sedd_scale.interop.sedd_names import our_rows, published_names

PREFIX = "backbone."

# Networks under the same names that compute something else, by the keys of their config.json.
_OTHER_NETWORKS = {
    "cross_attn": "whose blocks attend to a clean copy of the text before them",
    "causal": "which attends to the left alone",
    "causal_attention": "which attends to the left alone",
}


class MdlmSource(CheckpointSource):
    """A Lightning checkpoint, a file of weights, or a directory with config.json and weights.

    Args:
        assumptions: what the file does not say; with absorb, `time_conditioning` is false, as MDLM
            trains.

    Raises:
        CheckpointError: it is no such file, or a tensor is missing, unknown or misshapen.
    """

    format = "mdlm"

    def __init__(self, path: Path, assumptions: Assumptions | None = None) -> None:
        self.path = path
        assumptions = assumptions or Assumptions()
        self._averages: dict[str, Tensor] = {}
        averages: list[Tensor] | None = None
        if path.is_dir():
            self._weights = open_named_tensors(path, PREFIX)
        elif path.suffix == ".safetensors":
            self._weights = NamedTensors(SafetensorsFiles(path), PREFIX)
        else:
            self._file = PickledFile(path)
            tree = self._file.tree if isinstance(self._file.tree, dict) else {}
            self._weights = NamedTensors(self._file, PREFIX, tree.get("state_dict", tree))
            if tree.get("ema") is not None:
                averages = shadow_parameters(path, tree["ema"])
        shapes = self._weights.shapes
        if not shapes:
            raise CheckpointError(f"{path} has no tensors whose names begin with {PREFIX}")
        graph = assumptions.graph or "absorb"
        known: dict[str, dict[str, Any]]
        if graph == "absorb":
            known = {
                "model": {"time_conditioning": False},
                "training": {"objective": MaskedCrossEntropy.name},
            }
        else:
            known = {"model": {"time_conditioning": True, "parametrisation": "mean"}}
        if path.is_dir():
            _add_known(path, known, assumptions)
        config = config_of_shapes(path, shapes, assumptions, known=known)
        expected = published_shapes(config)
        check_tensors(
            path,
            {PREFIX + name: shape for name, shape in expected.items()},
            {PREFIX + name: shape for name, shape in without_buffer(shapes).items()},
        )
        self.holds = frozenset({"ema"})
        if averages is not None:
            # Behind the network's come the noise's, if it has any, one number each.
            while len(averages) > len(expected) and averages[-1].numel() == 1:
                averages.pop()
            order = parameter_order(
                path,
                expected,
                list(without_buffer(shapes)),
                [tuple(average.shape) for average in averages],
            )
            self._averages = dict(zip(order, averages, strict=True))
            self.holds = frozenset({"ema", "master"})
        self.described = Description(
            config=config,
            block_length=config.data.block_length,
        )
        num_layers = config.model.num_layers
        self._theirs = {ours: theirs for theirs, ours in published_names(num_layers).items()}

    def _read(self, name: str, key: str) -> Tensor:
        theirs = self._theirs[name]
        if key == "ema" and self._averages:
            tensor = self._file.read(self._averages[theirs])
        else:
            tensor = self._weights.read(theirs)
        return our_rows(name, tensor, self.described.config.model.num_heads)

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the file has them."""
        averages = [
            describe(f"{PREFIX}{name} (ema)", tensor) for name, tensor in self._averages.items()
        ]
        return self._weights.contents() + averages


def _add_known(directory: Path, known: dict[str, dict[str, Any]], assumptions: Assumptions) -> None:
    """What the config.json of a published MDLM or Duo says, as sections of ours.

    Raises:
        CheckpointError: it holds another kind of network, or contradicts an assumption.
    """
    file = directory / CONFIG_FILE
    if not file.is_file():
        return
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        return
    for key, what in _OTHER_NETWORKS.items():
        if raw.get(key):
            raise CheckpointError(
                f"{directory} cannot be read: {CONFIG_FILE} says {key}={str(raw[key]).lower()}, a "
                f"network {what}; give an MDLM or Duo checkpoint without it"
            )
    for section, key, theirs in (
        ("model", "num_heads", "n_heads"),
        ("model", "dropout", "dropout"),
        ("model", "time_conditioning", "time_conditioning"),
        ("data", "block_length", "model_length"),
    ):
        says, assumed = raw.get(theirs), getattr(assumptions, key, None)
        if says is None:
            continue
        if assumed not in (None, says):
            raise CheckpointError(
                f"{file} says {theirs}={str(says).lower()}, not {str(assumed).lower()}: use that"
            )
        known.setdefault(section, {})[key] = says
