"""Keyed dropout: a fair, independent coin for each number that no split of the work can move."""

import hashlib
import itertools
import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from sedd_scale.model.dropout import dropout, keep_mask

LENGTH, BATCH, WIDTH = 96, 6, 64
SIGMAS_ALLOWED = 5.0
DIGEST = "2fe9d10d34c25c49c846fb75798890e67407d1dc01ba0a5a96dd4492141140a7"


def keys(batch: int = BATCH) -> Tensor:
    return torch.randint(2**62, (batch,), generator=torch.Generator().manual_seed(4))


def dropped(
    rate: float, *, keys_B: Tensor | None = None, site: int = 0, first_position: int = 0
) -> Tensor:
    """Where numbers are dropped, [L, B, H]."""
    return ~kept(
        keys() if keys_B is None else keys_B,
        length=LENGTH,
        rate=rate,
        site=site,
        first_position=first_position,
    )


def kept(keys_B: Tensor, **options: Any) -> Tensor:
    return keep_mask(*dropout(keys_B, width=WIDTH, **options))


def correlation_in_sigmas(first: Tensor, second: Tensor, rate: float) -> float:
    """Sample covariance of two sets of coins over its standard deviation if independent."""
    covariance = ((first.double() - rate) * (second.double() - rate)).mean()
    return abs(covariance.item()) * math.sqrt(first.numel()) / (rate * (1 - rate))


def excess_in_sigmas(counts: Tensor, trials: int, rate: float) -> float:
    """Chi-square of binomial counts, in standard deviations from its mean."""
    chi_square = (counts.double() - trials * rate).square().sum() / (trials * rate * (1 - rate))
    degrees = counts.numel()
    return abs(chi_square.item() - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_kept(rate: float) -> None:
    drops = dropped(rate)
    error = abs(drops.double().mean().item() - rate)
    assert error < SIGMAS_ALLOWED * math.sqrt(rate * (1 - rate) / drops.numel())


def test_the_bits_are_those_of_every_run_before() -> None:
    """A run that is resumed drops what it would have dropped."""
    bits = numpy.packbits(dropped(0.1, site=5, first_position=7).numpy())
    assert hashlib.sha256(bits.tobytes()).hexdigest() == DIGEST


def test_rate_zero_keeps_all() -> None:
    assert not dropped(0.0).any()


def test_the_mask_does_not_know_how_work_is_split() -> None:
    whole = dropped(0.3)
    assert torch.equal(dropped(0.3), whole)
    parts = [dropped(0.3, keys_B=part) for part in keys().split([1, 3, 2])]
    assert torch.equal(torch.cat(parts, dim=1), whole)

    first, second = (
        kept(keys(), length=length, rate=0.3, site=0, first_position=start)
        for length, start in ((40, 0), (LENGTH - 40, 40))
    )
    assert torch.equal(~torch.cat([first, second]), whole)


def test_state_of_torchs_generator_plays_no_part() -> None:
    torch.manual_seed(1)
    first = dropped(0.3)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(dropped(0.3), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_of_sites_keys_and_neighbours_are_independent(rate: float) -> None:
    consecutive = torch.arange(1000, 1000 + BATCH)
    base = dropped(rate, keys_B=consecutive)
    pairs = {
        "sites": (base, dropped(rate, keys_B=consecutive, site=1)),
        "far sites": (base, dropped(rate, keys_B=consecutive, site=23)),
        "keys": (base[:, 1:], base[:, :-1]),
        "keys a bit apart": (base, dropped(rate, keys_B=consecutive ^ (1 << 31))),
        "positions": (base[1:], base[:-1]),
        "positions by 32": (base[32:], base[:-32]),
        "channels": (base[..., 1:], base[..., :-1]),
        "channels by 32": (base[..., 32:], base[..., :-32]),
        "diagonal": (base[1:, :, 1:], base[:-1, :, :-1]),
        "key and position": (base[1:, :-1], base[:-1, 1:]),
        "key and channel": (base[:, 1:, :-1], base[:, :-1, 1:]),
    }
    for name, (first, second) in pairs.items():
        assert correlation_in_sigmas(first, second, rate) < SIGMAS_ALLOWED, name


def test_no_channel_position_or_key_is_favoured() -> None:
    rate = 0.1
    drops = dropped(rate, keys_B=torch.arange(32))
    for kept_dim, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        counts = drops.sum(dim=others)
        trials = drops.numel() // drops.shape[kept_dim]
        assert excess_in_sigmas(counts, trials, rate) < SIGMAS_ALLOWED, kept_dim


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_patterns_of_eight_neighbours_are_equally_likely(dim: int) -> None:
    """A linear relation between neighbours' coins would make some patterns impossible."""
    drops = dropped(0.5, keys_B=torch.arange(64))
    eights = drops.movedim(dim, -1).reshape(-1, 8).long()
    patterns = (eights << torch.arange(8)).sum(1)
    counts = torch.bincount(patterns, minlength=256).double()
    expected = len(patterns) / 256
    chi_square = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_square - 255) < SIGMAS_ALLOWED * math.sqrt(2 * 255)


def test_all_sites_of_a_deep_network_differ() -> None:
    masks = [dropped(0.5, keys_B=keys(1), site=site) for site in range(48)]
    for first, second in itertools.combinations(masks, 2):
        agreement = (first == second).double().mean().item()
        assert abs(agreement - 0.5) < 6 * 0.5 / math.sqrt(first.numel())
