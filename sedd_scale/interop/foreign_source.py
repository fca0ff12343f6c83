"""Weights of MDLM (arXiv 2406.07524), Duo (arXiv 2506.10892) and others: the names of SEDD.

What the outputs mean is not in the names of tensors:

* of absorb (MDLM), scaled log-scores up to the constant that a softmax divides out: a network of
  `training.objective=masked_cross_entropy`, whose bound is the one that MDLM reports;
* of uniform (Duo, UDLM), logits of the clean token, of which scores follow:
  `model.parametrisation=mean`, whose score entropy is the bound that both report;
* of score entropy trained in their frameworks, log-scores, as SEDD's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.checkpoint.reading import check_tensors
from sedd_scale.diffusion.objectives import MaskedCrossEntropy, ScoreEntropy
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import (
    Description,
    FileSource,
    tokenizer_in,
)
from sedd_scale.interop.foreign_config import (
    NOTHING,
    Said,
    assumed,
    is_published,
    known_of,
    mask_of,
)
from sedd_scale.interop.foreign_files import (
    CheckpointFiles,
    Entry,
    Weights,
    entry_of,
    open_weights,
)
from sedd_scale.interop.foreign_shapes import config_of_shapes
from sedd_scale.interop.sedd_directory import published_shapes
from sedd_scale.interop.sedd_names import INV_FREQ, our_rows, published_names
from sedd_scale.planning.model_states import STATE_KEYS


class ForeignSource(FileSource):
    """A file of weights, or a directory that holds one, maybe with its configuration.

    Args:
        path: what messages name, and where its tokenizer may be; None: that of the files.

    Raises:
        CheckpointError: it is no such file, a tensor is missing, unknown or misshapen, or the
            network may be two things and nothing says which.
    """

    format = "mdlm"

    def __init__(
        self, files: CheckpointFiles, assumptions: Assumptions, *, path: Path | None = None
    ) -> None:
        self.path = path = path or files.path
        self._weights = weights = open_weights(files, assumptions)
        prefix, shapes = weights.network.prefix, weights.network.shapes
        known = self._known(files.weights, weights, assumptions)
        config = config_of_shapes(path, shapes, known)
        expected = published_shapes(config)
        master, named = weights.network.tensors, weights.averages
        self._tensors: dict[str, Mapping[str, Entry]]
        self._tensors = {"ema": named.tensors if named else master, "master": master}
        for tensors in self._tensors.values():
            check_tensors(
                path,
                {prefix + name: shape for name, shape in expected.items()},
                {prefix + name: t.shape for name, t in tensors.items() if name != INV_FREQ},
            )
        self._order = [name for name in shapes if name != INV_FREQ]
        ema = weights.tree.get("ema")
        if named is None and isinstance(ema, dict) and "shadow_params" in ema:
            averages = shadow_parameters(path, ema)
            # Behind the network's come the noise's, if it has any, one number each.
            while len(averages) > len(expected) and averages[-1].numel() == 1:
                averages.pop()
            listed = [tuple(average.shape) for average in averages]
            self._order = parameter_order(path, expected, self._order, listed)
            self._tensors["ema"] = {
                name: entry_of(weights.file, f"{name} (ema)", tensor)
                for name, tensor in zip(self._order, averages, strict=True)
            }
        is_one = self._tensors["ema"] is master
        self.holds = frozenset({"ema"} if is_one else {"ema", "master"})
        self.mask_id = mask_of(path, known, config, assumptions)
        self.described = Description(
            config=config,
            block_length=config.data.block_length,
            tokenizer_directory=tokenizer_in(path),
            assumed=assumed(known, config, INV_FREQ in shapes),
        )
        num_layers = config.model.num_layers
        self._theirs = {ours: theirs for theirs, ours in published_names(num_layers).items()}

    @staticmethod
    def claims(files: CheckpointFiles) -> bool:
        """It takes what no other does."""
        return True

    def _known(self, file: Path, weights: Weights, assumptions: Assumptions) -> dict[str, Said]:
        """What is said, and what follows from it of the outputs' meaning.

        Raises:
            CheckpointError: nothing says what the outputs are, and they may be two things.
        """
        prefix = weights.network.prefix
        known = known_of(file, weights.tree, assumptions)
        is_uniform = known.get("graph.name", NOTHING).value == "uniform"
        objective = known.get("training.objective", NOTHING)
        if is_uniform and "model.parametrisation" not in known:
            if objective.by_user or not prefix:
                mean, score = (assumptions.spelled(parametrisation=p) for p in ("mean", "score"))
                raise CheckpointError(
                    f"{file} does not say what its outputs are: give {mean} (logits of the clean "
                    f"token, as Duo's and UDLM's) or {score} (log-scores, as SEDD's)"
                )
            known["model.parametrisation"] = Said("mean", "")
        if not is_uniform and objective is NOTHING:
            if not prefix:
                kinds = ScoreEntropy, MaskedCrossEntropy
                sedd, mdlm = (assumptions.spelled(objective=kind.name) for kind in kinds)
                raise CheckpointError(
                    f"{file} does not say what its outputs are: put the config.json of a published "
                    f"SEDD model beside it, or give {sedd} (log-scores, as SEDD's) or {mdlm} "
                    "(logits, as MDLM's)"
                )
            objective = known["training.objective"] = Said(MaskedCrossEntropy.name, "")
        # MDLM trains without unless told otherwise; its configuration says so, if it is there.
        known.setdefault(
            "model.time_conditioning", Said(objective.value != MaskedCrossEntropy.name, "")
        )
        return known

    def _read(self, name: str, key: str) -> Tensor:
        tensor = self._tensors[key][self._theirs[name]].read()
        num_heads = self.described.config.model.num_heads
        return our_rows(name, tensor, num_heads, mask_id=self.mask_id)

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the file has them."""
        return [
            entry[:4]
            for key in STATE_KEYS
            if key in self.holds
            for entry in self._tensors[key].values()
        ]


class PublishedSource(ForeignSource):
    """A directory in the published format, whose configuration says all."""

    format = "sedd-hf"

    @staticmethod
    def claims(files: CheckpointFiles) -> bool:
        """Whether its config.json is that of a published SEDD."""
        return is_published(files.config)


def shadow_parameters(path: Path, ema: Any) -> list[Tensor]:
    """The averages of an `ema` entry, in order.

    Raises:
        CheckpointError: there are none.
    """
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(averages, list | tuple) or not all(isinstance(t, Tensor) for t in averages):
        raise CheckpointError(
            f"{path}: ema has no shadow_params, a list of tensors in the order of the parameters"
        )
    return list(averages)


def parameter_order(
    path: Path, expected: Mapping[str, Shape], listed: Sequence[str], shapes: Sequence[Shape]
) -> list[str]:
    """Names of the parameters in the order of `shapes`, those of tensors without names.

    Args:
        expected: shape of each parameter, in the order of the authors' modules.
        listed: the order of the file's state dict.

    Raises:
        CheckpointError: their number or their shapes fit no order.
    """
    if len(shapes) != len(expected):
        raise CheckpointError(
            f"{path}: ema.shadow_params has {len(shapes)} tensors, the model {len(expected)} "
            "parameters"
        )
    for order in (list(listed), list(expected)):
        if [expected[name] for name in order] == list(shapes):
            return order
    number, name = next(
        (number, name)
        for number, name in enumerate(listed)
        if tuple(expected[name]) != tuple(shapes[number])
    )
    raise CheckpointError(
        f"{path}: ema.shadow_params[{number}] is {list(shapes[number])} and should be {name} "
        f"{list(expected[name])}"
    )
