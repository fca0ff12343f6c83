"""Objectives: what the network is trained for, and how its text is scored.

All objectives train the same trunk in the same loop. An objective decides the attention pattern,
the network's input, which rows have a loss and with what weight, and which terms complete the
likelihood bound:

    score_entropy         diffusion-weighted score entropy (arXiv 2310.16834); both graphs
    masked_cross_entropy  cross-entropy of masked tokens, weighted by g / (e^sigma - 1): the same
                          bound for scores that are normalised by construction (MDLM, arXiv
                          2406.07524, equation 10; the t-DCE loss of RADD, arXiv 2406.03736)
    d3pm_absorb           the variational bound of a chain of T steps plus a multiple of the plain
                          cross-entropy (arXiv 2107.03006, section 3.3 and equation 5)
    autoregressive        next-token cross-entropy under causal attention; no noise

The loss of a row of the last three is weight * cross-entropy: the third column of the noise is the
weight.
B sequences, L positions, K draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sedd_scale.config import Config, TrainingConfig
from sedd_scale.diffusion.corruption import Draw, NoisyBatch
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.schedules import Schedule

# Of a time in steps: k / T times T may come out a little above k.
_ROUNDING = 1e-9


class Objective(ABC):
    """What a network is trained for.

    Attributes:
        name: as `training.objective` names it.
        causal: whether a position sees itself and those before it only, and is shown what `shown`
            says; then every position has a loss that something stands before.
        cross_entropy: whether the loss of a row is weight * cross-entropy, not score entropy.
        first_is_given: whether nothing stands before a document's first token, which is then given.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = False
    cross_entropy: ClassVar[bool] = True

    @property
    def first_is_given(self) -> bool:
        return False

    def shown(self, tokens_BL: Tensor, graph: Graph) -> Tensor:
        """What a causal network is shown of tokens at their positions, [B, L]."""
        raise TypeError(f"{self.name} is not causal")

    def first_time(self, t_min: float) -> float:
        """Where the times that `corrupt` takes begin; `t_min` is the configuration's."""
        return t_min

    @abstractmethod
    def noise_columns(self, schedule: Schedule, t_B: Tensor, *, training: bool) -> Tensor:
        """sigma, its rate g and a row's weight at times t, float64 [B, 3].

        Args:
            training: with what is only there to help the training, which no bound may hold.
        """

    def corrupt(
        self,
        clean_BL: Tensor,
        draw: Draw,
        *,
        graph: Graph,
        schedule: Schedule,
        t_min: float,
        t_B: Tensor | None = None,
    ) -> NoisyBatch:
        """What the network is shown of a batch, and the weights of its loss.

        No draw depends on which other samples are asked for.

        Args:
            clean_BL: token ids on the host, of the draw's samples.
            t_min: the configuration's.
            t_B: in place of the drawn times.

        Raises:
            DataError: an id outside the graph's tokens.
        """
        graph.check_tokens(clean_BL)
        clean_BL = clean_BL.long()
        batch, length = clean_BL.shape
        assert len(draw) == batch, (len(draw), clean_BL.shape)
        if t_B is None:
            t_B = draw.times(self.first_time(t_min))
        t_B = self.on_grid(t_B.double())
        moves_BL = torch.from_numpy(draw.uniforms(length, "moves"))
        tokens_BL = None
        if graph.mask_id is None:
            tokens_BL = torch.from_numpy(draw.uniforms(length, "tokens"))
        return NoisyBatch(
            noisy_BL=graph.corrupt(clean_BL, schedule.sigma(t_B), moves_BL, tokens_BL),
            clean_BL=clean_BL,
            t_B=t_B,
            noise_B3=self.noise_columns(schedule, t_B, training=draw.stream == "train"),
            dropout_key_B=draw.dropout_keys(),
        )

    def on_grid(self, t_B: Tensor) -> Tensor:
        """The times of the objective's own grid that times stand for."""
        return t_B

    def closing(self, graph: Graph, schedule: Schedule, t_min: float) -> tuple[float, float]:
        """(width, closing): the bound is width * mean loss + closing, in nats per token.

        The mean is over times of `corrupt` outside of training. The ends need no network: prior at
        time 1, and decoding at the first time as if every token were equally likely.
        """
        ends = torch.tensor([1.0, t_min], dtype=torch.float64)
        sigma_end, sigma_start = schedule.sigma(ends)
        closing = graph.prior_kl_per_token(sigma_end) + graph.decoding_cost_per_token(sigma_start)
        return 1.0 - t_min, float(closing)


def _noise(schedule: Schedule, t_B: Tensor) -> Tensor:
    t_B = t_B.double()
    return torch.stack(
        [schedule.sigma(t_B), schedule.rate(t_B), schedule.rate_over_expm1(t_B)], dim=1
    )


@dataclass(frozen=True)
class _ContinuousTime(Objective):
    """The integral over time of a rate times a divergence.

    Training may soften its weights by c: times m / (m + c), with m the move probability. Of absorb
    rows, whose loss is g / (e^sigma - 1) = m' / m times a cross-entropy, the weight is then
    m' / (m + c): the few rows of little noise count for less than in the bound, and so does how
    much their number varies.
    """

    softening: float = 0.0

    def noise_columns(self, schedule: Schedule, t_B: Tensor, *, training: bool) -> Tensor:
        columns = _noise(schedule, t_B)
        if training and self.softening > 0:
            move_B = schedule.move_probability(t_B.double())
            columns[:, 1:] *= (move_B / (move_B + self.softening))[:, None]
        return columns


class ScoreEntropy(_ContinuousTime):
    """Diffusion-weighted score entropy."""

    name = "score_entropy"
    cross_entropy = False


class MaskedCrossEntropy(_ContinuousTime):
    """Cross-entropy of masked tokens, weighted by g / (e^sigma - 1) = m' / m."""

    name = "masked_cross_entropy"


@dataclass(frozen=True)
class D3PMAbsorb(Objective):
    """A chain of `steps` steps of the absorbing graph that predicts clean tokens.

    Step k of T goes from time k / T to (k - 1) / T: a mask is lifted with probability
    w_k = (m_k - m_(k-1)) / m_k, where m is the move probability, and the last one lifts all that
    are left (w_1 = 1). With the token's law a softmax, the step's divergence is w_k times the
    cross-entropy of the masked tokens; visible ones are carried over and have no loss. With the
    log-linear schedule w_k = 1 / k, the paper's own. Training adds the plain cross-entropy,
    `ce_weight` times to each step's divergence (the paper's lambda, 0.01 for text), and divides by
    1 + T lambda: its loss is a mean of the bound and of cross-entropy.
    """

    name = "d3pm_absorb"
    steps: int = 1000
    ce_weight: float = 0.01

    def first_time(self, t_min: float) -> float:
        return 0.0

    def on_grid(self, t_B: Tensor) -> Tensor:
        """The end of the step that holds each time; an end stays."""
        number_B = (t_B.double() * self.steps - _ROUNDING).ceil().clamp(1, self.steps)
        return number_B / self.steps

    def inner_times(self, u_K: Tensor) -> Tensor:
        """Ends of the steps 2..T at quantiles u in [0, 1), each as likely as the others."""
        number_K = (u_K.double() * (self.steps - 1)).floor().clamp(max=self.steps - 2) + 2
        return number_K / self.steps

    def lifted(self, schedule: Schedule, t_B: Tensor) -> Tensor:
        """w_k at times k / T, float64 [B]."""
        t_B = t_B.double()
        before_B = (t_B - 1.0 / self.steps).clamp_min(0.0)
        move_B, left_B = schedule.move_probability(t_B), schedule.move_probability(before_B)
        return torch.where(t_B * self.steps < 1.5, 1.0, (move_B - left_B) / move_B)

    def noise_columns(self, schedule: Schedule, t_B: Tensor, *, training: bool) -> Tensor:
        columns = _noise(schedule, t_B)
        columns[:, 2] = self.steps * self.lifted(schedule, t_B)
        if training:
            extra = self.steps * self.ce_weight
            columns[:, 2] = (columns[:, 2] + extra) / (1.0 + extra)
        return columns

    def closing(self, graph: Graph, schedule: Schedule, t_min: float) -> tuple[float, float]:
        """The prior alone: the last step decodes."""
        sigma = schedule.sigma(torch.ones((), dtype=torch.float64))
        return 1.0, float(graph.prior_kl_per_token(sigma))


@dataclass(frozen=True)
class Autoregressive(Objective):
    """Next-token cross-entropy; the mask stands before the first token of a block.

    Where outputs are for the next token, the network is shown the tokens as they are: nothing
    stands before the first, which is given and has no loss.
    """

    name = "autoregressive"
    causal = True
    shift: bool = False

    def noise_columns(self, schedule: Schedule, t_B: Tensor, *, training: bool) -> Tensor:
        """No noise, and weight 1."""
        columns = torch.zeros(len(t_B), 3, dtype=torch.float64)
        columns[:, 2] = 1.0
        return columns

    def corrupt(
        self,
        clean_BL: Tensor,
        draw: Draw,
        *,
        graph: Graph,
        schedule: Schedule,
        t_min: float,
        t_B: Tensor | None = None,
    ) -> NoisyBatch:
        """What `shown` says, without noise."""
        graph.check_tokens(clean_BL)
        clean_BL = clean_BL.long()
        t_B = torch.zeros(len(clean_BL), dtype=torch.float64)
        return NoisyBatch(
            noisy_BL=self.shown(clean_BL, graph),
            clean_BL=clean_BL,
            t_B=t_B,
            noise_B3=self.noise_columns(schedule, t_B, training=draw.stream == "train"),
            dropout_key_B=draw.dropout_keys(),
        )

    def closing(self, graph: Graph, schedule: Schedule, t_min: float) -> tuple[float, float]:
        """Nothing: the loss is the likelihood itself."""
        return 1.0, 0.0

    @property
    def first_is_given(self) -> bool:
        return self.shift

    def shown(self, tokens_BL: Tensor, graph: Graph) -> Tensor:
        return tokens_BL if self.shift else shifted(tokens_BL, graph)


def shifted(tokens_BL: Tensor, graph: Graph) -> Tensor:
    """The tokens one position later, with the mask first; [B, L]."""
    assert graph.mask_id is not None
    start_B1 = torch.full_like(tokens_BL[:, :1], graph.mask_id)
    return torch.cat([start_B1, tokens_BL[:, :-1]], dim=1)


OBJECTIVES: dict[str, Callable[[TrainingConfig], Objective]] = {
    ScoreEntropy.name: lambda training: ScoreEntropy(training.weight_softening),
    MaskedCrossEntropy.name: lambda training: MaskedCrossEntropy(training.weight_softening),
    D3PMAbsorb.name: lambda training: D3PMAbsorb(training.d3pm_steps, training.d3pm_ce_weight),
    Autoregressive.name: lambda training: Autoregressive(training.shift),
}


def make_objective(config: Config) -> Objective:
    """The objective a configuration names."""
    return OBJECTIVES[config.training.objective](config.training)
