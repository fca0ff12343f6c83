"""What a row of the network's outputs means: its log-scores, its statistics, its loss and gradient.

One class for each combination of graph, parametrisation and loss that there is; `row_law` names
them. Formulas are those of `score_entropy`. Letters as there.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.diffusion.graphs import Absorb, Graph, Uniform, over_positions
from sedd_scale.diffusion.score_entropy import (
    RowLoss,
    RowNoise,
    Statistics,
    absorb_rows,
    cross_entropy_rows,
    log_expm1,
    mean_log_scores,
    scaled_absorb_rows,
    uniform_rows,
)
from sedd_scale.errors import ConfigError


class RowLaw(ABC):
    """How logits [.., V] of one position are read.

    Attributes:
        graph: the forward process.
        counts_own: whether the noisy token's own column has a part in the loss.
        of_clean_token: whether logits are those of the clean token's law, whose scores follow from
            all of a row (`parallel.mean_chunk` has its passes).
        bounded: whether a row's loss stays finite as the noise goes, whatever the network says.
    """

    counts_own: ClassVar[bool] = True
    of_clean_token: ClassVar[bool] = False
    bounded: ClassVar[bool] = True

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @abstractmethod
    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        """Each row's loss in nats, weighted, with its gradient coefficients; float64 within.

        A logit too large for the type of the statistics gives an infinite loss.

        Args:
            statistics: [M] each.
            noise: [M] each.
            unchanged_M: rows whose noisy token is the clean one; where `counts_own` is false.
        """

    def log_scores(self, logits_V: Tensor, states: Tensor, sigma: Tensor) -> Tensor:
        """Log-scores [.., V] in the logits' type; a state's own entry is 0.

        Args:
            states: the noisy ids [..].
            sigma: total noise in nats, of the leading shape of `states`.
        """
        divisor = self.log_divisor(over_positions(sigma.double(), states))
        logits_V = logits_V - divisor.unsqueeze(-1).to(logits_V.dtype)
        return logits_V.scatter(-1, states.long().unsqueeze(-1), 0.0)

    def log_divisor(self, sigma: Tensor) -> Tensor:
        """What a logit lies above its log-score, float64 of sigma's shape."""
        return torch.zeros_like(sigma, dtype=torch.float64)

    def with_known_constant(self, logits_MV: Tensor) -> Tensor:
        """The logits as `log_scores` takes them, where the loss leaves a constant open.

        In place.
        """
        return logits_MV

    def when_normalised(self) -> "RowLaw | None":
        """The law of the same logits with scores normalised; None where they are, or cannot be."""
        return None


class AbsorbScores(RowLaw):
    """Masked rows; logits are log-scores (arXiv 2310.16834, section 3)."""

    bounded = False

    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        return absorb_rows(statistics, noise)

    def when_normalised(self) -> RowLaw | None:
        return CrossEntropy(self.graph)


class ScaledAbsorbScores(RowLaw):
    """Masked rows; a log-score is z - ln(e^sigma - 1) - ln N (the same, appendix C)."""

    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        return scaled_absorb_rows(statistics, noise, self.graph.num_tokens)

    def log_divisor(self, sigma: Tensor) -> Tensor:
        return log_expm1(sigma.double()) + math.log(self.graph.num_tokens)

    def when_normalised(self) -> RowLaw | None:
        return CrossEntropy(self.graph)


class CrossEntropy(ScaledAbsorbScores):
    """Cross-entropy of the clean token, times the noise's third column: the mean parametrisation.

    With q = softmax(z) the law of the clean token, scores are s_y = q_y / (e^sigma - 1), whose
    score entropy is this loss. They are scaled scores of rows where the mean of e^z is 1.
    """

    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        return cross_entropy_rows(statistics, noise.rate_over_expm1)

    def with_known_constant(self, logits_MV: Tensor) -> Tensor:
        tokens = self.graph.num_tokens
        log_sum_M1 = logits_MV[:, :tokens].logsumexp(dim=1, keepdim=True)
        logits_MV[:, :tokens] -= log_sum_M1 - math.log(tokens)
        return logits_MV

    def when_normalised(self) -> RowLaw | None:
        return None


class UniformScores(RowLaw):
    """Every row; logits are log-scores of the other tokens."""

    counts_own = False
    bounded = False

    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        assert unchanged_M is not None, "the uniform graph needs to know which rows are unchanged"
        return uniform_rows(statistics, noise, self.graph.num_tokens, unchanged_M)


class UniformMean(UniformScores):
    """Every row; logits are those of the clean token's law (arXiv 2412.10193, section 3)."""

    of_clean_token = True
    bounded = True

    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        raise TypeError("its statistics are `MeanStatistics`, its loss `mean_row_loss`")

    def log_scores(self, logits_V: Tensor, states: Tensor, sigma: Tensor) -> Tensor:
        return mean_log_scores(logits_V, states, over_positions(sigma.double(), states))


class LogTotal(RowLaw):
    """Masked rows; not a loss but the logarithm of the sum of scores times (e^sigma - 1).

    It is 0 for the true scores of any row.

    Args:
        scores: the law that the logits are read by.
    """

    def __init__(self, scores: RowLaw) -> None:
        super().__init__(scores.graph)
        self.scores = scores

    def rows(
        self, statistics: Statistics, noise: RowNoise, unchanged_M: Tensor | None = None
    ) -> RowLoss:
        log_sum = statistics.max.double() + statistics.sum_exp.double().log()
        sigma = noise.sigma.double()
        total = log_sum - self.scores.log_divisor(sigma) + log_expm1(sigma)
        nothing = torch.zeros_like(statistics.max)
        return RowLoss(total.to(statistics.max.dtype), nothing, nothing, nothing)


def row_law(
    graph: Graph, *, scaled: bool = False, mean: bool = False, cross_entropy: bool = False
) -> RowLaw:
    """The law of a combination.

    Args:
        scaled: logits are log-scores up to the known shift of sigma.
        mean: logits are those of the clean token's law; of absorb their score entropy is
            weighted cross-entropy, and `scaled` says nothing.
        cross_entropy: the loss is weighted cross-entropy.

    Raises:
        ConfigError: a combination that is none.
    """
    if isinstance(graph, Absorb):
        if mean or cross_entropy:
            return CrossEntropy(graph)
        return ScaledAbsorbScores(graph) if scaled else AbsorbScores(graph)
    if isinstance(graph, Uniform) and not (scaled or cross_entropy):
        return UniformMean(graph) if mean else UniformScores(graph)
    words = {
        "model.scale_by_sigma=true": scaled,
        "model.parametrisation=mean": mean,
        "a loss of cross-entropy": cross_entropy,
    }
    named = " and ".join(word for word, said in words.items() if said)
    raise ConfigError(f"graph.name={graph.name} does not go with {named}: set the other graph")


def law_of(config: Config, graph: Graph, *, cross_entropy: bool) -> RowLaw:
    """The law that a configuration names; `cross_entropy` says what its loss is."""
    return row_law(
        graph,
        scaled=config.resolved_scale_by_sigma,
        mean=config.model.parametrisation == "mean",
        cross_entropy=cross_entropy,
    )
