"""Distributed pretraining of Score Entropy Discrete Diffusion models (arXiv 2310.16834)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "infill", "load_pretrained", "sample"]

if TYPE_CHECKING:
    from sedd_scale.interop.pretrained import load_pretrained
    from sedd_scale.sampling.completions import infill, sample


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that `--help` need not import torch."""
    if name == "load_pretrained":
        from sedd_scale.interop.pretrained import load_pretrained

        return load_pretrained
    if name in ("infill", "sample"):
        from sedd_scale.sampling import completions

        return getattr(completions, name)
    raise AttributeError(f"module 'sedd_scale' has no attribute {name!r}")
