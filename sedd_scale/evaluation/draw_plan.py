"""How the draws of a bound are planned: times, replicates and the keys of all random numbers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedd_scale.arrays import FloatArray
from sedd_scale.diffusion.corruption import keyed_uniforms
from sedd_scale.diffusion.objectives import D3PMAbsorb
from sedd_scale.errors import ConfigError
from sedd_scale.evaluation.importance import uniform_times, weighted_times
from sedd_scale.model.logit_model import LogitModel

DEFAULT_DRAWS = {"low-variance": 16, "paper": 1000, "any-order": 8}
DEFAULT_MAX_BLOCKS = {"low-variance": None, "paper": 1024, "any-order": 64}
# Degrees of freedom below which an interval is too wide to be of use.
_ENOUGH_FREEDOM = 30


@dataclass(frozen=True)
class Plan:
    """How many times each block is looked at, and where its random numbers come from.

    Attributes:
        draws: times per block.
        replicates: independent stratified samples that they fall into.
        seed: of all draws.
        batch_size: sequences in one network call.
        protocol: "low-variance" or "paper".
        t_min: where the integral begins.
    """

    draws: int
    replicates: int
    seed: int
    batch_size: int
    protocol: str
    t_min: float

    @property
    def has_ends(self) -> bool:
        """Whether prior and reconstruction are counted."""
        return self.protocol == "low-variance"

    def times(self, model: LogitModel, block_id: int) -> tuple[Tensor, Tensor]:
        """Times of a block's draws, replicate after replicate, and the weight of each."""
        strata = self.draws // self.replicates
        uniform = self.uniforms("time", self.draws, block_id, 0)
        place = np.tile(np.arange(strata), self.replicates)
        u_K = torch.from_numpy((place + uniform) / strata)
        if isinstance(model.objective, D3PMAbsorb):
            # A mean over all steps but the last, which is the decoder.
            t_K = model.objective.inner_times(u_K)
            return t_K, torch.full_like(t_K, 1.0 - self.t_min if self.has_ends else 1.0)
        if self.has_ends:
            bounded = model.law.bounded
            return weighted_times(u_K, model.schedule, t_min=self.t_min, bounded=bounded)
        return uniform_times(u_K, t_min=self.t_min)

    def moves(self, purpose: str, length: int, block_id: int, draw: int) -> FloatArray:
        """The uniforms by which a draw's tokens move, [length].

        Low-variance draws of the integral are antithetic: the k-th stratum from the end has those
        of the k-th from the beginning, turned round, so that tokens left alone at a late time are
        the ones moved at an early time. Each draw alone has the law of independent ones.
        """
        if purpose != "noise" or not self.has_ends:
            return self.uniforms(f"{purpose}/moves", length, block_id, draw)
        strata = self.draws // self.replicates
        first, place = draw - draw % strata, draw % strata
        partner = min(place, strata - 1 - place)
        moves_L = self.uniforms(f"{purpose}/moves", length, block_id, first + partner)
        return moves_L if place == partner else 1.0 - moves_L

    def uniforms(self, purpose: str, count: int, block_id: int, draw: int) -> FloatArray:
        """`count` uniforms of a block's draw, keyed by all four."""
        return keyed_uniforms(
            count, seed=self.seed, stream=f"bound/{purpose}", step=draw, sample=block_id
        )


def make_plan(
    num_blocks: int,
    *,
    draws: int | None,
    replicates: int | None,
    seed: int,
    batch_size: int,
    protocol: str,
    t_min: float,
) -> Plan:
    """The plan that the arguments of `evaluate_bound` make; raises ConfigError."""
    if not 0.0 < t_min < 1.0:
        raise ConfigError(f"t_min={t_min} is not between 0 and 1: give a number such as 1e-3")
    draws = DEFAULT_DRAWS[protocol] if draws is None else draws
    if draws < 2:
        raise ConfigError(
            f"{draws} draws per block leave no way to tell a standard error: give at least 2"
        )
    if protocol == "paper":
        if replicates not in (None, draws):
            raise ConfigError(
                f"replicates={replicates}: the draws of protocol paper are all independent; leave "
                "replicates out"
            )
        replicates = draws
    elif replicates is None:
        divisors = [count for count in range(2, draws + 1) if draws % count == 0]
        enough = [count for count in divisors if num_blocks * (count - 1) >= _ENOUGH_FREEDOM]
        replicates = enough[0] if enough else draws
    if replicates < 2 or draws % replicates:
        raise ConfigError(
            f"replicates={replicates} does not split {draws} draws: give a divisor of at least 2"
        )
    return Plan(draws, replicates, seed, batch_size, protocol, t_min)
