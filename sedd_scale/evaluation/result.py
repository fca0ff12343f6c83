"""What an evaluation finds, whatever the objective: nats per token with their error and parts."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from sedd_scale.arrays import FloatArray, IntArray
from sedd_scale.evaluation.standard_error import Estimate

BOUND, EXACT, ANY_ORDER = "bound", "exact", "any-order"
TERMS = ("diffusion", "prior", "reconstruction")


@dataclass(frozen=True)
class OtherNats:
    """A second value of the same blocks and draws, nats per token, with its standard error."""

    nats_per_token: float
    stderr: float


@dataclass(frozen=True)
class BoundResult:
    """The negative log-likelihood of a set of blocks, or a bound on it.

    Nats are per token, averaged over all blocks.

    Attributes:
        nats_per_token: the bound, or the likelihood itself.
        stderr: its standard error from the draws, for these blocks (another seed); 0 without draws.
        stderr_text: its standard error as an estimate for the source the blocks come from (other
            blocks and another seed); None for a single block.
        ci95: 95% interval from `stderr`.
        terms: nats per token of diffusion, prior and reconstruction; None where the protocol
            leaves a term out or the likelihood has none.
        draws: times, or orders, drawn a block; 0 for an exact likelihood.
        replicates: independent replicates the draws of a block fall into.
        blocks: number of blocks.
        tokens: number of tokens in them.
        network_calls: sequences that went through the network, over all ranks.
        protocol: "low-variance", "paper", "any-order" or "chain-rule".
        t_min: where the integral begins; 0 where there is none.
        seconds: wall time.
        block_nats_n: nats per token of each block.
        kind: BOUND (an integral), EXACT (the chain rule) or ANY_ORDER (a mean over orders).
        normalised: the bound with normalised scores, which is never above the other; None where
            scores are normalised anyway, or the graph has no such thing.
        likelihood: an estimate of the likelihood itself, from above; any-order alone.
        notes: how many tokens of the text have no part in the number, by what they are.
    """

    nats_per_token: float
    stderr: float
    stderr_text: float | None
    ci95: tuple[float, float]
    blocks: int
    tokens: int
    network_calls: int
    protocol: str
    seconds: float
    block_nats_n: FloatArray
    terms: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(TERMS))
    draws: int = 0
    replicates: int = 0
    t_min: float = 0.0
    kind: str = BOUND
    normalised: OtherNats | None = None
    likelihood: OtherNats | None = None
    notes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, estimate: Estimate, text_n: IntArray, began: float, **others: Any) -> "BoundResult":
        """The result that an estimate is.

        Args:
            text_n: tokens of each block that are counted.
            began: when the evaluation began, by `time.perf_counter`.
            others: the other attributes.
        """
        return cls(
            nats_per_token=estimate.mean,
            stderr=estimate.stderr,
            stderr_text=estimate.stderr_text,
            ci95=estimate.ci95,
            blocks=len(text_n),
            tokens=int(text_n.sum()),
            seconds=time.perf_counter() - began,
            **others,
        )

    @property
    def bits_per_token(self) -> float:
        """The bound in bits."""
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats per token), infinite beyond what a float holds."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf
