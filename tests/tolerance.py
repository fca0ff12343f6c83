"""How far a float32 result may be from the truth, derived from what is computed.

One rounding moves a number by at most 2^-24 of itself. Which roundings happen, and in which order
sums are taken, is the processor's and its libraries' affair; a tolerance read off one of them fails
on the next. How much a result moves when its numbers are rounded is a property of the formula and
of its inputs, the same on every machine. It is measured here by Monte Carlo arithmetic (Parker,
1997): the definition runs in float64, and every operand and every result of every elementary
operation, backward pass too, is moved at random by as much as float32 might. The root mean square
of what comes out, over a few draws, is the *spread* of a result: the norm of its error.

Rounded once, a number moves by up to 2^-24 of itself. In a sum of n terms taken one after the other
each partial sum is rounded; in a random order these errors are together those of terms and total
moved by up to sqrt(n) roundings each, or less (Higham and Mary, 2019). Libraries add in the lanes
of a vector register, 8 at least, and in blocks: a chain is n/8 terms long, or shorter.

A program may use other operations than the definition, and a few times as many: it is given 6
spreads. What float32 cannot explain fails, and the bounds are tight: few reach 10^-5 of a result's
norm, so that a formula that is wrong by 10^-4 fails too. `Bound.tells` says whether it would.

    exact, = float32_bounds(definition, *inputs)
    exact.check(found)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROUNDING = 2.0**-24  # the greatest relative error of one rounding to float32
LANES = 8  # numbers of a vector register, each a sum of its own
SPREADS = 6
DRAWS = 8

# Of small networks, where two computations in float32 are compared: losses, log-scores and what a
# run of some steps makes of them; and gradients. `tests/model/test_pretrained.py` holds both to be
# more than twice what float32 can explain. Whole runs are forty times nearer.
NETWORK = 1e-5
GRADIENT = 3e-5

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
ROW_SUMS = {"_softmax", "_log_softmax", "native_layer_norm", "cumsum"}


class RandomRounding(TorchDispatchMode):
    """Float64 arithmetic, each operation as uncertain as it would be in float32."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            result = func(*args, **kwargs)
            tree_map_only(Tensor, lambda value: value.copy_(self.moved(value)), result)
            return result
        operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        result = func(*args, **kwargs)
        size = ROUNDING * chain_length(func, operands, result) ** 0.5
        args, kwargs = tree_map_only(Tensor, lambda value: self.moved(value, size), (args, kwargs))
        return tree_map_only(Tensor, lambda value: self.moved(value, size), func(*args, **kwargs))

    def moved(self, value: Tensor, size: float = ROUNDING) -> Tensor:
        """The same numbers, each moved by up to `size` of itself; other types as they are."""
        if value.dtype != torch.float64:
            return value
        move = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
        return value * (1 + size * (2 * move - 1))


def chain_length(func: Any, operands: list[Tensor], result: Any) -> float:
    """How many terms an operation adds one after the other; 1 if it adds none."""
    name = func.overloadpacket.__name__
    if name in PRODUCTS:
        terms = operands[-1].shape[0 if operands[-1].dim() == 1 else -2]
    elif any(name.startswith(row_sum) for row_sum in ROW_SUMS):  # backward passes too
        terms = operands[0].shape[-1]
    else:  # a sum's operand is larger than its result
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        terms = max((value.numel() for value in operands), default=0) / max([1, *sizes])
    return max(1.0, terms / LANES)


@dataclass(frozen=True)
class Bound:
    """A result in float64, and the norm of the error that float32 may make of it."""

    exact: Tensor
    reach: float

    def error(self, found: Tensor) -> float:
        """Norm of the difference to the exact result, in units of what float32 explains."""
        assert found.shape == self.exact.shape
        distance = _distance(found.detach().double(), self.exact)
        if distance == 0:
            return 0.0
        return distance / self.reach if self.reach else math.inf

    def check(self, found: Tensor, what: str = "result") -> None:
        """Fails where float32 does not explain the difference; zeros have to be zeros."""
        error = self.error(found)
        assert error <= 1, f"{what} is off by {error:.3g} times what float32 can explain"

    def tells(self, relative: float) -> bool:
        """Whether a result that is wrong by this part of itself, and exact else, fails."""
        return not self.exact.count_nonzero() or self.reach < relative * self.exact.norm().item()


def float32_bounds(
    definition: Callable[..., Sequence[Tensor]], *inputs: Tensor, draws: int = DRAWS
) -> list[Bound]:
    """The results of a definition for these inputs, each with the error that float32 may make.

    `definition` takes the inputs in float64, as leaves that gradients can be taken of, and returns
    tensors.
    """

    def results() -> list[Tensor]:
        leaves = [
            value.detach().double().requires_grad_() if value.is_floating_point() else value
            for value in inputs
        ]
        return [value.detach() for value in definition(*leaves)]

    exact = results()
    squares = [0.0] * len(exact)
    for seed in range(draws):
        with RandomRounding(seed):
            moved = results()
        for index, pair in enumerate(zip(moved, exact)):
            squares[index] += _distance(*pair) ** 2
    spreads = [math.sqrt(square / draws) for square in squares]
    return [Bound(value, SPREADS * spread) for value, spread in zip(exact, spreads)]


def _distance(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference; infinities have to be the same ones."""
    infinite = exact.isinf()
    if not torch.equal(found[infinite], exact[infinite]):
        return math.inf
    return (found - exact)[~infinite].norm().item()
