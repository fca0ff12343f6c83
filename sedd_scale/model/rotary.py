"""Rotary positions: by what angle each entry of a head turns at each position."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.config import ModelConfig


class RotaryAngles(NamedTuple):
    """What the angles depend on.

    Attributes:
        base: entry i of D turns by position / base^(2i / D); base 0 turns nothing.
        scaling: "none", "llama3" or "yarn": how turns are slowed down, by `factor` at most.
        original_length: L of the first training.
        low, high: turns over that length below which all of the factor counts, and from which on
            nothing does.
        attention_factor: of the turned queries and keys.
    """

    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0

    @classmethod
    def of(cls, model: ModelConfig) -> "RotaryAngles":
        """What a configuration says."""
        base = model.rotary_base if model.positions == "rotary" else 0.0
        if model.rotary_scaling == "none" or not base:
            return cls(base)
        is_yarn, factor = model.rotary_scaling == "yarn", model.rotary_factor
        attention = model.rotary_attention_factor or 0.1 * math.log(factor) + 1.0
        return cls(
            base=base,
            scaling=model.rotary_scaling,
            factor=factor,
            original_length=model.rotary_original_length or 0,
            low=model.rotary_low,
            high=model.rotary_high or (32.0 if is_yarn else 4.0),
            attention_factor=attention if is_yarn else 1.0,
        )

    def slowed(self, turn: Tensor) -> Tensor:
        """Positions that a radian takes, [D / 2], of those it takes without scaling.

        Source: Llama 3 (arXiv 2407.21783) by the number of turns over the original length, YaRN
        (arXiv 2309.00071, section 3.2) by the entry at which that number is reached.
        """
        if self.scaling == "none":
            return turn
        if self.scaling == "llama3":
            turns = self.original_length / (2 * math.pi * turn)
            kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            half = len(turn)
            first, last = (
                half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(self.base)
                for turns in (self.high, self.low)
            )
            begin, end = max(math.floor(first), 0), min(math.ceil(last), 2 * half - 1)
            entry = torch.arange(half, dtype=turn.dtype, device=turn.device)
            kept = 1 - ((entry - begin) / max(end - begin, 1e-3)).clamp(0, 1)
        return turn / (kept + (1 - kept) / self.factor)


@functools.lru_cache(maxsize=8)
def rotary_table(
    length: int, head_dim: int, angles: RotaryAngles, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, [L, 1, 1, 1, D / 2] each (Su et al., 2104.09864)."""
    # The table outlives the call: made in inference mode it could not serve training after.
    with torch.inference_mode(False):
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        position = torch.arange(length, dtype=torch.float32, device=device)
        base = angles.base
        turn = base**exponent if base else torch.full_like(exponent, torch.inf)
        angle = position[:, None] / angles.slowed(turn)
        angle = angle[:, None, None, None]
        return tuple(  # type: ignore[return-value]
            (of_angle * angles.attention_factor).to(dtype)
            for of_angle in (angle.cos(), angle.sin())
        )
