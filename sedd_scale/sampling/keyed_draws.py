"""Uniform numbers of a batch of samples: each a pure function of (seed, id, step, position)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sedd_scale.diffusion.corruption import keyed_uniforms

# Numbers a float32 in [0, 1) is made of: all multiples of 2^-24.
_FLOAT32_GRID = 2.0**24


class KeyedDraws:
    """Uniforms of samples, keyed by each one's seed and id, so that company changes nothing.

    Attributes:
        dtype: of the numbers; float32 keeps 24 of their 53 random bits.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        ids: Sequence[int],
        *,
        length: int,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.seeds, self.ids = list(seeds), list(ids)
        self.length, self.device, self.dtype = length, device, dtype

    def uniform(self, purpose: str, step: int) -> Tensor:
        """In [0, 1), [B * L]."""
        rows = [
            keyed_uniforms(self.length, seed=seed, stream=f"sample/{purpose}", step=step, sample=i)
            for seed, i in zip(self.seeds, self.ids)
        ]
        flat = self.rounded(torch.from_numpy(np.concatenate(rows) if rows else np.empty(0)))
        if self.device.type == "cuda":
            flat = flat.pin_memory()  # from where a copy does not wait for what is queued
        return flat.to(self.device, non_blocking=True)

    def rounded(self, uniform: Tensor) -> Tensor:
        """Float64 uniforms in the precision of the draws, below 1 still."""
        if self.dtype == torch.float32:
            return (uniform * _FLOAT32_GRID).floor().float() / _FLOAT32_GRID
        return uniform

    def prior(self, num_tokens: int) -> Tensor:
        """Uniformly drawn tokens [B, L]."""
        tokens = (self.uniform("prior", 0).double() * num_tokens).long().clamp(max=num_tokens - 1)
        return tokens.view(len(self.ids), self.length)
