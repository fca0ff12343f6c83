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


def keep_mask(
    keys_B: Tensor, *, length: int, width: int, rate: float, site: int, first_position: int
) -> Tensor:
    """Which entries dropout leaves, bool [length, B, width]; each goes with probability `rate`.

    Rows (a position of a sequence) and channels are hashed well and cheaply, being few. Their
    product is not: an affine map that each row draws, applied to the channel's hash, then one more
    round, in 32-bit integers that wrap.

    Args:
        keys_B: one integer per sequence and step.
        site: which dropout of the network this is.
        first_position: position in the sequence of the first row.
    """
    device = keys_B.device
    position_L = torch.arange(first_position, first_position + length, device=device)
    channel_H = torch.arange(width, device=device)
    key_B = _mix((keys_B.to(torch.int64) + 0x9E3779B9 * (site + 1)) & _WORD)
    row_LB1 = _mix(key_B[None, :] ^ _mix(position_L)[:, None])[..., None]
    factor_LB1 = (row_LB1 | 1).to(torch.int32)
    offset_LB1 = _mix(row_LB1 ^ 0x5BD1E995).to(torch.int32)
    bits_LBH = factor_LB1 * _mix(channel_H + 0x632BE5AB).to(torch.int32)
    bits_LBH += offset_LB1
    bits_LBH ^= bits_LBH >> 15
    bits_LBH *= 0x2C1B3C6D
    return bits_LBH >= int(rate * 2**32) - 2**31
