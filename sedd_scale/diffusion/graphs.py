"""Graphs: to which states the noise moves a token (arXiv 2310.16834, section 3.3).

Tokens are ids 0..N-1. `Absorb` turns a token into one more state, the mask (id N), and leaves it
there; `Uniform` draws it again among all N. States number V: N + 1 and N.

Wherever a function takes tokens and a noise level, the noise level has the leading shape of the
tokens (sigma_B for tokens_BL, or a full sigma_BL).
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_scale.errors import ConfigError, DataError


def over_positions(values: Tensor, tokens: Tensor) -> Tensor:
    """View `values` so that it broadcasts over the remaining dimensions of `tokens`."""
    assert values.dim() <= tokens.dim(), (values.shape, tokens.shape)
    return values.reshape(values.shape + (1,) * (tokens.dim() - values.dim()))


class Graph(ABC):
    """A forward corruption process on one token, independent over positions."""

    name: ClassVar[str]

    def __init__(self, num_tokens: int) -> None:
        if num_tokens < 2:
            raise ConfigError(
                f"model.vocab_size={num_tokens}: a vocabulary needs at least 2 tokens"
            )
        self.num_tokens = num_tokens

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_tokens})"

    @property
    @abstractmethod
    def num_states(self) -> int:
        """V, the number of states of a noisy token."""

    @property
    @abstractmethod
    def mask_id(self) -> int | None:
        """The id of the mask state, or None where there is none."""

    @abstractmethod
    def transition_probabilities(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Law of the noisy token given the state it started from: float64 [.., V]."""

    @abstractmethod
    def corrupt(
        self,
        clean_BL: Tensor,
        sigma_B: Tensor,
        move_uniform_BL: Tensor,
        token_uniform_BL: Tensor | None,
    ) -> Tensor:
        """Noisy tokens [B, L] at noise sigma_B, a fixed function of uniforms in [0, 1).

        A token moves where move_uniform < 1 - e^(-sigma); token_uniform (unused by absorb, which
        takes None) chooses where to.
        """

    @abstractmethod
    def prior_kl_per_token(self, sigma: Tensor) -> Tensor:
        """The bound's terminal term, KL(p(x_1 | x_0) || prior), in nats per token at sigma."""

    @abstractmethod
    def decoding_cost_per_token(self, sigma: Tensor) -> Tensor:
        """E[-ln p(x_0 | x_t)] in nats per token when p is the forward law itself: needs no network.

        With every clean token equally likely beforehand, p(x_0 | x_t) is the forward law turned
        round; at the smallest time it closes a bound on the likelihood at little cost.
        """

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise DataError unless every id is a real token, 0..N-1; for tensors on the host."""
        if tokens.numel() == 0:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.num_tokens:
            raise DataError(
                f"token id {low if low < 0 else high} is outside 0..{self.num_tokens - 1}: "
                "prepare the data with the tokenizer of this model"
            )

    def _move_probability(self, sigma: Tensor, tokens: Tensor) -> Tensor:
        return -torch.expm1(-over_positions(sigma.double(), tokens))

    def _one_hot(self, states: Tensor) -> Tensor:
        table = states.new_zeros(*states.shape, self.num_states, dtype=torch.float64)
        return table.scatter_(-1, states.long().unsqueeze(-1), 1.0)


class Absorb(Graph):
    """Each token becomes the mask with probability 1 - e^(-sigma), and a mask stays one."""

    name = "absorb"

    @property
    def num_states(self) -> int:
        return self.num_tokens + 1

    @property
    def mask_id(self) -> int:
        return self.num_tokens

    def transition_probabilities(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        move = self._move_probability(sigma, tokens)
        keep = torch.exp(-over_positions(sigma.double(), tokens))
        rows = self._one_hot(tokens) * keep.unsqueeze(-1)
        rows[..., self.mask_id] += move
        return rows

    def corrupt(
        self,
        clean_BL: Tensor,
        sigma_B: Tensor,
        move_uniform_BL: Tensor,
        token_uniform_BL: Tensor | None = None,
    ) -> Tensor:
        moved_BL = move_uniform_BL < self._move_probability(sigma_B, clean_BL)
        return torch.where(moved_BL, self.mask_id, clean_BL)

    def prior_kl_per_token(self, sigma: Tensor) -> Tensor:
        """KL in nats per token against a prior with room for the tokens not yet masked at t = 1.

        Against a prior of all masks the KL is infinite, since a token is still visible with
        probability e^(-sigma). The bound holds for any prior, so the prior here is: mask with
        probability 1 - e^(-sigma), else one of the N tokens uniformly. The KL is then e^(-sigma) ln
        N: the visible tokens are paid for at ln N nats each.
        """
        return (torch.exp(-sigma.double()) * math.log(self.num_tokens)).to(sigma.dtype)

    def decoding_cost_per_token(self, sigma: Tensor) -> Tensor:
        """A masked token is one of N: (1 - e^(-sigma)) ln N."""
        return -torch.expm1(-sigma) * math.log(self.num_tokens)


class Uniform(Graph):
    """With probability 1 - e^(-sigma) a token is drawn again, uniformly over all N: it may stay."""

    name = "uniform"

    @property
    def num_states(self) -> int:
        return self.num_tokens

    @property
    def mask_id(self) -> None:
        return None

    def transition_probabilities(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        move = self._move_probability(sigma, tokens)
        keep = torch.exp(-over_positions(sigma.double(), tokens))
        return self._one_hot(tokens) * keep.unsqueeze(-1) + (move / self.num_tokens).unsqueeze(-1)

    def corrupt(
        self,
        clean_BL: Tensor,
        sigma_B: Tensor,
        move_uniform_BL: Tensor,
        token_uniform_BL: Tensor | None,
    ) -> Tensor:
        assert token_uniform_BL is not None, "the uniform graph needs a second uniform per token"
        moved_BL = move_uniform_BL < self._move_probability(sigma_B, clean_BL)
        # The product of a uniform below 1 and N may round up to N.
        drawn_BL = (token_uniform_BL.double() * self.num_tokens).long()
        return torch.where(
            moved_BL, drawn_BL.clamp(max=self.num_tokens - 1).to(clean_BL.dtype), clean_BL
        )

    def prior_kl_per_token(self, sigma: Tensor) -> Tensor:
        """KL(p(x_1 | x_0) || uniform) in nats per token, as a sum of non-negative terms."""
        keep = torch.exp(-sigma.double())
        others = self.num_tokens - 1
        # N p(y) = 1 + excess with excess (N-1)e^(-sigma) at x_0 and -e^(-sigma) elsewhere: they sum
        # to 0, so sum p ln(N p) = mean of (1 + excess) ln(1 + excess) - excess.
        nats = (
            _relative_excess(others * keep) + others * _relative_excess(-keep)
        ) / self.num_tokens
        return nats.to(sigma.dtype)

    def decoding_cost_per_token(self, sigma: Tensor) -> Tensor:
        """The entropy of a row of the forward law (which is symmetric)."""
        other = -torch.expm1(-sigma.double()) / self.num_tokens
        same = torch.exp(-sigma.double()) + other
        others = self.num_tokens - 1
        nats: Tensor = -torch.special.xlogy(same, same) - others * torch.special.xlogy(other, other)
        return nats.to(sigma.dtype)


def make_graph(name: str, num_tokens: int) -> Graph:
    """Build the graph of that name over `num_tokens` tokens; ConfigError if unknown or below 2."""
    kinds = {kind.name: kind for kind in (Absorb, Uniform)}
    if name not in kinds:
        raise ConfigError(f"graph.name={name!r}: choose {' or '.join(kinds)}")
    return kinds[name](num_tokens)


def _relative_excess(x: Tensor) -> Tensor:
    """(1 + x) ln(1 + x) - x for x >= -1: non-negative, x^2 / 2 near 0."""
    series = x.square() * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x / 30))))
    exact = torch.special.xlog1py(1.0 + x, x) - x
    return torch.where(x.abs() < 1e-3, series, exact)
