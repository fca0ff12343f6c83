"""The last layer: adaptive norm, then the vocabulary-parallel map to scores and its loss."""

import dataclasses

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_scale.config import ModelConfig
from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.model.adaln import AdaptiveNorm, modulation, sum_gradient
from sedd_scale.model.block import Stream
from sedd_scale.model.parameters import TOKENS, is_copy_of
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import (
    ScoreTargets,
    gathered_logits,
    linear_score_entropy,
    linear_score_entropy_per_sequence,
)
from sedd_scale.parallel.vocab_shard import VocabShard


class ScoreLinear(ColumnParallelLinear):
    """Megatron-core's column-parallel map whose forward is the loss itself.

    Under ZeRO 3 a weight is whole only inside its own module's forward, so the loss is computed
    there.
    """

    shard: VocabShard

    def forward(
        self,
        hidden_LBH: Tensor,
        targets: ScoreTargets,
        per_sequence: bool,
        law: RowLaw | None = None,
    ) -> Tensor:
        """Mean nats per token (a scalar), or nats of each sequence [B].

        Args:
            law: what the loss is to be, if other than the network is trained with.
        """
        shard = self.shard
        if law is not None:
            shard = dataclasses.replace(shard, law=law)
        function = linear_score_entropy_per_sequence if per_sequence else linear_score_entropy
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return function(hidden_LBH, self.weight, bias, targets, shard)


class Head(nn.Module):
    """norm, adaLN shift and scale, linear map to one logit a state (padded to the tensor ranks)."""

    def __init__(
        self,
        law: RowLaw,
        padded_states: int,
        model: ModelConfig,
        config: TransformerConfig,
        layout: Layout,
        *,
        shift: bool = False,
    ) -> None:
        super().__init__()
        self.logical_name = "head"
        graph = law.graph
        self.vocab_rows = {"linear.weight": graph.num_states, "linear.bias": graph.num_states}
        self.num_states = graph.num_states
        self.layout = layout
        self.norm = AdaptiveNorm(model, layout)
        self.modulation = modulation(model, 2, layout)
        self.linear = ScoreLinear(
            config.hidden_size,
            padded_states,
            config=config,
            init_method=config.init_method,
            bias=model.head_bias,
            tp_group=layout.tensor_group,
        )
        if model.tied_embedding:
            is_copy_of(self.linear.weight, TOKENS)
        columns = padded_states // layout.tensor
        start = columns * layout.tensor_rank
        self.linear.shard = VocabShard(
            law=law,
            start=start,
            length=max(0, min(columns, graph.num_tokens - start)),
            group=layout.tensor_group,
            rows_twice=shift,
        )

    def forward(self, stream: Stream) -> Tensor:
        """The linear map's input [L, B, H]: normed, every position on every tensor rank.

        A pipeline's last stage calls `linear` on it in the engine's loss function.
        """
        hidden_LBH, cond_BC, _ = stream
        normed, _ = self.norm(hidden_LBH, *self.modulation(cond_BC))
        if self.layout.sequence_parallel:
            return gather_from_sequence_parallel_region(normed, group=self.layout.tensor_group)
        return sum_gradient(normed, self.layout)

    def loss(self, stream: Stream, targets: ScoreTargets, *, per_sequence: bool) -> Tensor:
        """The objective's loss: mean nats per token, or nats of each sequence [B]."""
        return self.linear(self(stream), targets, per_sequence)

    @torch.no_grad()
    def logits(self, rows_MH: Tensor) -> Tensor:
        """Float32 logits [M, V] of rows of `forward`'s output, over the whole vocabulary.

        Where the loss is cross-entropy, which no constant added to a row changes, rows are made
        such that the mean of e^z over the tokens is 1: then they are log-scores up to the known
        shift of sigma, as those of scaled score entropy are.
        """
        logits_MV = gathered_logits(
            rows_MH,
            self.linear.weight,
            self.linear.bias,
            num_columns=self.num_states,
            tensor_group=self.layout.tensor_group,
        ).float()
        return self.linear.shard.law.with_known_constant(logits_MV)
