"""A trained network with its graph and schedule: log-scores and losses, without an engine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sedd_scale.config import Config
from sedd_scale.diffusion.graphs import Graph, make_graph
from sedd_scale.diffusion.objectives import make_objective
from sedd_scale.diffusion.row_law import RowLaw, law_of
from sedd_scale.diffusion.schedules import schedule_of
from sedd_scale.errors import DataError
from sedd_scale.model.attention import document_ends, document_starts, packed_context
from sedd_scale.model.logit_model import LogitModel
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import ScoreTargets, score_targets


class ScoreModel(nn.Module, LogitModel):
    """The score network s_theta(x, sigma) with the process it was trained for, in eval mode.

    Attributes:
        config: the configuration it was built from.
        graph: the forward process; `graph.num_tokens` is N and `graph.num_states` is V.
        schedule: the noise schedule sigma(t).
        objective: what it was trained for.
        law: what a row of outputs means.
        tokenizer: the tokenizer of its training data, or None where the format carries none.
        block_length: L of its training.
    """

    def __init__(
        self,
        config: Config,
        num_tokens: int,
        layout: Layout,
        *,
        block_length: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.graph: Graph = make_graph(config.graph.name, num_tokens)
        self.schedule = schedule_of(config)
        self.objective = make_objective(config)
        self.law = law_of(config, self.graph, cross_entropy=self.objective.cross_entropy)
        self.block_length = block_length
        self.tokenizer = tokenizer
        self.network = ScoreNetwork(layer_builders(config, self.graph, layout))
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def time_conditioned(self) -> bool:
        """Whether the network's outputs depend on sigma."""
        return self.config.model.time_conditioning and not self.causal

    @property
    def causal(self) -> bool:
        return self.objective.causal

    @torch.no_grad()
    def log_score(self, tokens_BL: Tensor, sigma_B: Tensor) -> Tensor:
        """log s_theta(x, sigma)_y for every state y: float32 [B, L, V], own-token entries 0.

        Args:
            tokens_BL: noisy tokens, ids 0..V-1.
            sigma_B: total noise sigma(t) of each sequence.

        Raises:
            DataError: a token that is not a state of the graph.

        Source: Lou et al., section 3 and the scaling of section 5.
        """
        tokens_BL = self._checked(tokens_BL, self.graph.num_states)
        sigma_B = sigma_B.to(self.device)
        hidden_LBH = self.network.hidden(tokens_BL, sigma_B)
        length, batch, width = hidden_LBH.shape
        rows = hidden_LBH.transpose(0, 1).reshape(batch * length, width)
        every_R = torch.arange(len(rows), device=rows.device)
        rows = rows.index_select(0, self._row_of(every_R, tokens_BL.shape, None))
        logits_BLV = self.network.head.logits(rows).view(batch, length, -1)
        return self.law.log_scores(logits_BLV, tokens_BL, sigma_B)

    @torch.no_grad()
    def rows(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        device = self.device
        ends_BE = None if ends_BE is None else ends_BE.to(device)
        rows_M = self._row_of(rows_M.to(device), tokens_BL.shape, ends_BE)
        return self.network.hidden_of_rows(
            tokens_BL.to(device), sigma_B.to(device), rows_M, ends_BE
        )

    def _row_of(self, places_M: Tensor, shape: torch.Size, ends_BE: Tensor | None) -> Tensor:
        """Of which positions of the flattened [B * L] the outputs are that are for `places_M`.

        With `training.shift` of those before, but where a document begins.
        """
        if self.causal or not self.config.training.shift:
            return places_M
        starts_R = document_starts(shape, ends_BE).to(places_M.device).flatten()
        return places_M - (~starts_R[places_M]).long()

    def logits_of(self, rows_MW: Tensor) -> Tensor:
        return self.network.head.logits(rows_MW)

    def caching(self, capacity: int) -> AbstractContextManager[None]:
        return self.network.caching(capacity)

    def loss(
        self,
        x0_BL: Tensor,
        t_B: Tensor | None = None,
        xt_BL: Tensor | None = None,
        generator: torch.Generator | None = None,
        counted_BL: Tensor | None = None,
    ) -> Tensor:
        """The training loss in nats of each sequence, [B], differentiable.

        By default that is diffusion-weighted score entropy (Lou et al., equation of the denoising
        score entropy loss); other objectives have their own.

        Args:
            x0_BL: clean tokens, ids 0..N-1.
            t_B: times in (0, 1]; drawn uniformly from [noise.t_min, 1] when not given.
            xt_BL: noisy tokens; drawn from the forward process at t when not given. An
                autoregressive model has no times, and sees the tokens one position later (with
                `training.shift` the tokens themselves; a document's first then has no loss).
            generator: the source of what is drawn (a CPU generator).
            counted_BL: the positions that are no padding, which has no part in the loss (on the
                host); None: all.

        With `train()` dropout is on; a new model is in eval mode.

        Raises:
            DataError: a token that is not one of the N, or xt of another shape than x0.
        """
        x0_BL = self._checked(x0_BL, self.graph.num_tokens).cpu()
        if t_B is None:
            t_min = self.objective.first_time(self.config.noise.t_min)
            uniform_B = torch.rand(len(x0_BL), generator=generator, dtype=torch.float64)
            t_B = t_min + (1 - t_min) * uniform_B
        t_B = self.objective.on_grid(t_B.cpu().double())
        noise_B3 = self.objective.noise_columns(self.schedule, t_B, training=True)
        if xt_BL is None and self.objective.causal:
            xt_BL = self.objective.shown(x0_BL, self.graph)
        elif xt_BL is None:
            move, token = (
                torch.rand(x0_BL.shape, generator=generator, dtype=torch.float64) for _ in range(2)
            )
            xt_BL = self.graph.corrupt(x0_BL, noise_B3[:, 0], move, token)
        hidden_LBH, targets = self._shown(x0_BL, xt_BL, noise_B3, counted_BL, generator)
        nats_B: Tensor = self.network.head.linear(hidden_LBH, targets, per_sequence=True)
        return nats_B

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
        x0_BL = self._checked(x0_BL, self.graph.num_tokens).cpu()
        hidden_LBH, targets = self._shown(x0_BL, xt_BL, noise_B3, counted_BL, None)
        columns = [
            self.network.head.linear(hidden_LBH, targets, per_sequence=True, law=law)
            for law in laws
        ]
        return torch.stack(columns, dim=1)

    def _shown(
        self,
        x0_BL: Tensor,
        xt_BL: Tensor,
        noise_B3: Tensor,
        counted_BL: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, ScoreTargets]:
        """The head's input for noisy tokens, and what its loss needs, on the device."""
        if xt_BL.shape != x0_BL.shape:
            raise DataError(
                f"xt has shape {tuple(xt_BL.shape)} and x0 {tuple(x0_BL.shape)}; give equal shapes"
            )
        xt_BL = self._checked(xt_BL, self.graph.num_states).cpu()
        ends_BE, starts_BL = self.document_ends(x0_BL), None
        if self.config.training.shift:
            starts_BL = document_starts(x0_BL.shape, ends_BE)
        targets = score_targets(
            self.graph,
            clean_BL=x0_BL,
            noisy_BL=xt_BL,
            noise_B3=noise_B3,
            every_position=self.objective.causal,
            counted_BL=counted_BL,
            starts_BL=starts_BL,
        )
        keys_B = torch.zeros(len(x0_BL), dtype=torch.int64)
        if self.training:  # dropout is keyed, so every call needs keys of its own
            keys_B = torch.randint(2**31, keys_B.shape, generator=generator)
        inputs = (xt_BL, noise_B3[:, 0].float(), packed_context(keys_B, ends_BE))
        hidden_LBH = self.network.head_input(tuple(tensor.to(self.device) for tensor in inputs))
        return hidden_LBH, targets.to(self.device)

    def first_token(self) -> int:
        if self.tokenizer is None:
            return super().first_token()
        return int(self.tokenizer.eos_id)

    def document_ends(self, clean_BL: Tensor) -> Tensor | None:
        """Where documents end, [B, E], or None where the model attends to whole blocks.

        Raises:
            DataError: the model attends within documents, but its tokenizer, which knows the token
                that ends them, is not there.
        """
        if not self.config.model.document_attention:
            return None
        if self.tokenizer is None:
            raise DataError(
                "this model attends within documents (model.document_attention=true) and needs its "
                "tokenizer to find them; give the tokenizer it was trained with"
            )
        return document_ends(clean_BL, self.tokenizer.eos_id)

    def _checked(self, tokens_BL: Tensor, limit: int) -> Tensor:
        if tokens_BL.numel() and not 0 <= int(tokens_BL.min()) <= int(tokens_BL.max()) < limit:
            raise DataError(
                f"token ids {int(tokens_BL.min())}..{int(tokens_BL.max())} do not fit this model's "
                f"0..{limit - 1}; use the tokenizer it was trained with"
            )
        return tokens_BL.to(self.device)
