"""Dropout whose mask is a pure function of (sample key, layer, site, position, channel).

No generator state: the mask is the same on every tensor-parallel rank, in every split of the batch
or the sequence, after a resume and when a block is recomputed in the backward pass.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(value: Tensor) -> Tensor:
    """A 32-bit avalanche (xor-shift-multiply rounds) held in int64; every bit depends on all."""
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _WORD
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _WORD
    return value ^ (value >> 16)


def keyed_dropout(
    value_LBH: Tensor, keys_B: Tensor, *, rate: float, site: int, first_position: int
) -> Tensor:
    """Drop entries with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
        value_LBH: positions `first_position`.. of each sequence.
        keys_B: one integer per sequence and step.
        site: which dropout of the network this is.
    """
    length, _, width = value_LBH.shape
    device = value_LBH.device
    position_L = torch.arange(first_position, first_position + length, device=device)
    channel_H = torch.arange(width, device=device)
    key_B = _mix((keys_B.to(torch.int64) + 0x9E3779B9 * (site + 1)) & _WORD)
    row_LB = _mix(key_B[None, :] ^ _mix(position_L)[:, None])
    bits_LBH = _mix(row_LB[..., None] ^ _mix(channel_H + 0x632BE5AB))
    keep_LBH = bits_LBH >= int(rate * 2**32)
    return torch.where(keep_LBH, value_LBH / (1.0 - rate), 0.0).to(value_LBH.dtype)
