"""Distributed pretraining of Score Entropy Discrete Diffusion models (arXiv 2310.16834)."""

import importlib
from typing import TYPE_CHECKING, Any

from sedd_scale.version import __version__

__all__ = [
    "__version__",
    "evaluate",
    "infill",
    "load_pretrained",
    "new_model",
    "sample",
    "save_pretrained",
]

if TYPE_CHECKING:
    from sedd_scale.evaluation.likelihood import evaluate
    from sedd_scale.generation.completions import infill, sample
    from sedd_scale.interop.pretrained import load_pretrained, save_pretrained
    from sedd_scale.model.new_model import new_model

_HOMES = {
    "evaluate": "sedd_scale.evaluation.likelihood",
    "infill": "sedd_scale.generation.completions",
    "load_pretrained": "sedd_scale.interop.pretrained",
    "new_model": "sedd_scale.model.new_model",
    "sample": "sedd_scale.generation.completions",
    "save_pretrained": "sedd_scale.interop.pretrained",
}


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that `--help` need not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sedd_scale' has no attribute {name!r}")
