"""Dropout whose mask is a pure function of (sample key, layer, site, position, channel).

No generator state: the mask is the same on every tensor-parallel rank, in every split of the batch
or the sequence, after a resume and when a block is recomputed in the backward pass.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_scale.model.compiled import compiled_on_gpu

_WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Which entries one dropout leaves, as the few numbers that its mask is made of.

    An entry's bits are factor * channel + offset, mixed once more, in wrapping 32-bit integers: a
    pass over the entries makes them as it goes, forward and backward, and no mask is stored.

    Attributes:
        rate: probability that an entry goes.
        factor_LB1, offset_LB1: of a position of a sequence, int32.
        channel_H: of a channel, int32.
    """

    rate: float
    factor_LB1: Tensor
    offset_LB1: Tensor
    channel_H: Tensor


def keep_mask(rate: float, factor_LB1: Tensor, offset_LB1: Tensor, channel_H: Tensor) -> Tensor:
    """The mask of a `Dropout`, bool [L, B, H]: true where an entry stays."""
    return entry_bits(factor_LB1, offset_LB1, channel_H) >= int(rate * 2**32) - 2**31


def entry_bits(factor_LB1: Tensor, offset_LB1: Tensor, channel_H: Tensor) -> Tensor:
    """What a `Dropout` knows of each entry, int32 [L, B, H]: uniform over all of them."""
    bits_LBH = factor_LB1 * channel_H
    bits_LBH += offset_LB1
    bits_LBH.bitwise_xor_(bits_LBH >> 15)
    bits_LBH *= 0x2C1B3C6D
    return bits_LBH


def _mix(value: Tensor) -> Tensor:
    """A 32-bit avalanche (xor-shift-multiply rounds) held in int64; every bit depends on all."""
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _WORD
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _WORD
    return value ^ (value >> 16)


def dropout(
    keys_B: Tensor, *, length: int, width: int, rate: float, site: int, first_position: int
) -> Dropout:
    """The dropout of one place in the network.

    Row and channel hashes are full strength; there are few of them.

    Args:
        keys_B: one integer per sequence and step.
        length, width: L and H.
        site: which dropout of the network this is.
        first_position: position in the sequence of the first row.
    """
    device = keys_B.device
    factor_LB1, offset_LB1 = _row_hashes(
        keys_B, _site_key(site, device), _positions(first_position, length, device)
    )
    return Dropout(rate, factor_LB1, offset_LB1, _channel_hashes(width, device))


@compiled_on_gpu
def _row_hashes(keys_B: Tensor, site_key: Tensor, position_L: Tensor) -> tuple[Tensor, Tensor]:
    key_B = _mix((keys_B.to(torch.int64) + site_key) & _WORD)
    row_LB1 = _mix(key_B[None, :] ^ _mix(position_L)[:, None])[..., None]
    return (row_LB1 | 1).to(torch.int32), _mix(row_LB1 ^ 0x5BD1E995).to(torch.int32)


# Of each place and device once: they are the same at every step, and a device is not asked twice.
@functools.lru_cache(maxsize=1024)
def _site_key(site: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(0x9E3779B9 * (site + 1), device=device)


@functools.lru_cache(maxsize=8)
def _positions(first: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(first, first + length, device=device)


@functools.lru_cache(maxsize=8)
def _channel_hashes(width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _mix(torch.arange(width, device=device) + 0x632BE5AB).to(torch.int32)
