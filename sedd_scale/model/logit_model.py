"""What gives logits: the one face of a model to sampling and evaluation.

A network is one (`ScoreModel`). So is whatever stands around networks: guidance keeps the rows of
two side by side, and its logits are a mean of theirs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.objectives import Autoregressive, Objective
from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.diffusion.schedules import Schedule
from sedd_scale.errors import DataError
from sedd_scale.model.attention import document_starts
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import losses_of_logits, score_targets


class LogitModel(ABC):
    """Rows of numbers at positions of noisy sequences, and the logits that are made of each row.

    W numbers are kept of a position: the head's input, or all logits where the model is a table.

    Attributes:
        graph: the forward process.
        schedule: the noise schedule.
        law: what a row of logits means.
        objective, config, layout: what it was trained for, and how it is laid out; of evaluation.
        device: where its tensors live.
        time_conditioned: whether logits depend on sigma.
    """

    graph: Graph
    schedule: Schedule
    law: RowLaw
    objective: Objective
    config: Config
    layout: Layout

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def time_conditioned(self) -> bool: ...

    @property
    def causal(self) -> bool:
        """Whether a position sees only those before it, so that samples grow from left to right."""
        return False

    @property
    def kind(self) -> str:
        """How its samples come about: "autoregressive", or else by the name of its graph."""
        return Autoregressive.name if self.causal else self.graph.name

    @abstractmethod
    def rows(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        """What is kept of chosen positions, [M, W]; arguments may be on the host.

        Args:
            tokens_BL: noisy tokens; to a causal model what its objective says that it is shown.
                Inside `caching` those alone that follow what it has seen.
            sigma_B: total noise of each sequence in nats.
            rows_M: indices into the flattened [B * L] positions whose token the rows are for; of a
                causal model positions of what it is shown.
            ends_BE: where each sequence's documents end, for attention within documents.
        """

    @abstractmethod
    def logits_of(self, rows_MW: Tensor) -> Tensor:
        """The logits [M, V] of rows."""

    def logits(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        """The logits [M, V] at chosen positions, arguments as of `rows`."""
        return self.logits_of(self.rows(tokens_BL, sigma_B, rows_M, ends_BE))

    def caching(self, capacity: int) -> AbstractContextManager[None]:
        """Inside, `rows` of a causal model takes the next positions, `capacity` in all."""
        return nullcontext()

    def document_ends(self, clean_BL: Tensor) -> Tensor | None:
        """Where documents end, [B, E], or None where the model attends to whole blocks."""
        return None

    def first_token(self) -> int:
        """What a sample begins with where the model says nothing of first tokens.

        Raises:
            DataError: the model knows none.
        """
        raise DataError(
            "this model predicts no first token (training.shift=true): give it, or the tokenizer "
            "whose EOS samples are to begin with"
        )

    def starts(self, clean_BL: Tensor) -> Tensor | None:
        """The given first tokens of an autoregressive model's documents, bool [B, L]; or None."""
        if not self.objective.first_is_given:
            return None
        return document_starts(clean_BL.shape, self.document_ends(clean_BL))

    @torch.no_grad()
    def losses(
        self,
        x0_BL: Tensor,
        xt_BL: Tensor,
        noise_B3: Tensor,
        counted_BL: Tensor | None = None,
        *,
        laws: Sequence[RowLaw],
    ) -> Tensor:
        """Losses of each sequence in nats, [B, C]: a column for each of `laws`.

        Args:
            x0_BL: clean tokens; all arguments are on the host.
            xt_BL: noisy tokens.
            noise_B3: sigma, its rate and the weight of cross-entropy.
            counted_BL: the positions that are no padding, which has no part in the loss; None: all.
            laws: the model's own, or what it would be with scores normalised
                (`RowLaw.when_normalised`), whose loss is never greater.
        """
        batch, length = x0_BL.shape
        targets = score_targets(
            self.graph,
            clean_BL=x0_BL,
            noisy_BL=xt_BL,
            noise_B3=noise_B3,
            every_position=self.causal,
            counted_BL=counted_BL,
            starts_BL=self.starts(x0_BL),
        ).to(self.device)
        places_M = targets.rows_M % batch * length + targets.rows_M // batch
        rows_MW = self.rows(xt_BL, noise_B3[:, 0], places_M, self.document_ends(x0_BL))
        return losses_of_logits(rows_MW, self.logits_of, targets, laws)
