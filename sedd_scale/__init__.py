"""Distributed pretraining of Score Entropy Discrete Diffusion models (arXiv 2310.16834)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
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
    from sedd_scale.interop.pretrained import load_pretrained, save_pretrained
    from sedd_scale.model.new_model import new_model
    from sedd_scale.sampling.completions import infill, sample

_HOMES = {
    "evaluate": "sedd_scale.evaluation.likelihood",
    "infill": "sedd_scale.sampling.completions",
    "load_pretrained": "sedd_scale.interop.pretrained",
    "new_model": "sedd_scale.model.new_model",
    "sample": "sedd_scale.sampling.completions",
    "save_pretrained": "sedd_scale.interop.pretrained",
}


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that `--help` need not import torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sedd_scale' has no attribute {name!r}")
