"""Tensors and gradients under the published names and back."""

from collections.abc import Mapping

from torch import Tensor

from sedd_scale.interop.sedd_names import our_rows, published_names, published_rows
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel


def to_logical(published: Mapping[str, Tensor], *, num_heads: int) -> dict[str, Tensor]:
    """Published tensors under our names, in our row order; the rotary buffer is left out."""
    layers = {name.split(".")[1] for name in published if name.startswith("blocks.")}
    return {
        ours: our_rows(ours, published[theirs], num_heads)
        for theirs, ours in published_names(len(layers)).items()
    }


def to_published(
    logical: Mapping[str, Tensor], *, num_layers: int, num_heads: int
) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under the published names, in the published row order."""
    return {
        theirs: published_rows(ours, logical[ours], num_heads)
        for theirs, ours in published_names(num_layers).items()
    }


def published_gradients(model: ScoreModel) -> dict[str, Tensor]:
    """The parameters' gradients under the published names (one process)."""
    assert model.layout.tensor == 1
    gradients = {}
    for parameter in logical_parameters(model.network, model.layout):
        assert parameter.parameter.grad is not None, f"{parameter.name} has no gradient yet"
        gradients[parameter.name] = parameter.parameter.grad
    config = model.config.model
    return to_published(gradients, num_layers=config.num_layers, num_heads=config.num_heads)
