"""Keyed dropout: a fair, independent coin for each number that no split of the work can move."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sedd_scale.model.dropout import keyed_dropout

LENGTH, BATCH, WIDTH = 96, 6, 64
SIGMAS_ALLOWED = 5.0


def keys(batch: int = BATCH) -> Tensor:
    return torch.randint(2**62, (batch,), generator=torch.Generator().manual_seed(4))


def dropped(
    rate: float, *, keys_B: Tensor | None = None, site: int = 0, first_position: int = 0
) -> Tensor:
    """Where numbers are dropped, [L, B, H]."""
    keys_B = keys() if keys_B is None else keys_B
    ones = torch.ones(LENGTH, len(keys_B), WIDTH)
    result = keyed_dropout(ones, keys_B, rate=rate, site=site, first_position=first_position)
    return result == 0


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


def test_what_is_kept_is_scaled_to_keep_the_mean() -> None:
    values = torch.randn(LENGTH, BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    result = keyed_dropout(values, keys(), rate=0.1, site=3, first_position=0)
    kept = result != 0
    torch.testing.assert_close(result[kept], values[kept] / 0.9, rtol=1e-6, atol=0.0)
    spread = values.norm() * math.sqrt(0.1 / 0.9)
    assert abs((result - values).sum()) < SIGMAS_ALLOWED * spread


def test_rate_zero_keeps_all_and_types_stay() -> None:
    values = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    found = keyed_dropout(values, keys(2), rate=0.0, site=0, first_position=0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values)


def test_the_gradient_passes_where_values_do() -> None:
    values = torch.randn(LENGTH, BATCH, WIDTH, requires_grad=True)
    keyed_dropout(values, keys(), rate=0.25, site=1, first_position=0).sum().backward()
    expected = (~dropped(0.25, site=1)).float() / 0.75
    torch.testing.assert_close(values.grad, expected, rtol=1e-6, atol=0.0)


def test_the_mask_does_not_know_how_work_is_split() -> None:
    whole = dropped(0.3)
    assert torch.equal(dropped(0.3), whole)
    parts = [dropped(0.3, keys_B=part) for part in keys().split([1, 3, 2])]
    assert torch.equal(torch.cat(parts, dim=1), whole)

    values = torch.ones(LENGTH, BATCH, WIDTH)
    first, second = (
        keyed_dropout(part, keys(), rate=0.3, site=0, first_position=start) == 0
        for part, start in ((values[:40], 0), (values[40:], 40))
    )
    assert torch.equal(torch.cat([first, second]), whole)


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
