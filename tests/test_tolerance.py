"""Bounds hold for float32 in any order of summation, and not for formulas that are wrong."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from tests.tolerance import float32_bounds

Definition = Callable[..., Sequence[Tensor]]


def softmax_nats(logits_MV: Tensor, target_M: Tensor) -> list[Tensor]:
    """-log softmax of each row at its target, and the mean's gradient."""
    nats_M = logits_MV.exp().sum(1).log() - logits_MV.gather(1, target_M[:, None])[:, 0]
    return [nats_M, *torch.autograd.grad(nats_M.mean(), logits_MV)]


def variance(x_N: Tensor) -> list[Tensor]:
    return [(x_N - x_N.mean()).square().mean()]


def product(a_MK: Tensor, b_KN: Tensor) -> list[Tensor]:
    return [a_MK @ b_KN]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES: dict[str, tuple[Definition, tuple[Tensor, ...]]] = {
    "softmax": (softmax_nats, (draw(7, 3000), torch.arange(7))),
    "variance about a mean of 30": (variance, (30 + draw(5000),)),
    "product": (product, (draw(6, 20000), draw(20000, 5, seed=1))),
}


def in_float32(definition: Definition, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
    leaves = [
        value.float().requires_grad_() if value.is_floating_point() else value for value in inputs
    ]
    return definition(*leaves)


def rounded_inputs(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What float32 is given is exact: only what it makes of it is rounded."""
    return tuple(value.float().double() if value.is_floating_point() else value for value in inputs)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_within_its_bounds_and_a_wrong_formula_is_not(case: str) -> None:
    definition, inputs = CASES[case]
    inputs = rounded_inputs(inputs)
    for bound, found in zip(float32_bounds(definition, *inputs), in_float32(definition, inputs)):
        bound.check(found)
        assert bound.tells(1e-4)
        with pytest.raises(AssertionError, match="float32 can explain"):
            bound.check(found * (1 + 1e-4))


@pytest.mark.parametrize("order", ["as they stand", "ascending", "shuffled"])
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["cancelling", "growing"])
def test_eight_lanes_added_term_by_term_are_within_the_bound(order: str, shift: float) -> None:
    terms_N = (shift + draw(8 * 4000)).float()
    if order == "ascending":
        terms_N = terms_N[terms_N.abs().argsort()]
    if order == "shuffled":
        terms_N = terms_N[torch.randperm(len(terms_N), generator=torch.Generator().manual_seed(1))]
    (bound,) = float32_bounds(lambda x_N: [x_N.sum()], terms_N)
    lanes = torch.zeros(8)
    for row in terms_N.view(-1, 8):
        lanes = lanes + row
    total = lanes[0]
    for lane in lanes[1:]:
        total = total + lane
    bound.check(total)


def test_what_is_exactly_zero_has_to_be_found_so() -> None:
    (bound,) = float32_bounds(lambda x_N: [0 * x_N], torch.ones(3))
    bound.check(torch.zeros(3))
    with pytest.raises(AssertionError):
        bound.check(torch.tensor([0.0, 1e-30, 0.0]))


def test_cancellation_widens_the_bound() -> None:
    """1e4 + x - 1e4 keeps x to 1e4 * 2^-24 only, and the bound knows."""
    (plain,) = float32_bounds(lambda x_N: [x_N * 1.0], torch.ones(10))
    (cancelled,) = float32_bounds(lambda x_N: [(x_N + 1e4) - 1e4], torch.ones(10))
    cancelled.check((torch.full((10,), 1.0) + 1e4) - 1e4 + 1e-3)
    assert cancelled.reach > 1000 * plain.reach
