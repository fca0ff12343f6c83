"""The list of layers as DeepSpeed pipeline stages.

Between stages travel one floating-point tensor, the hidden states with the conditioning vector
appended as further positions, and the integers of the context: DeepSpeed runs a backward pass for
each floating-point tensor, so one is better than two. It wants what travels to be of one shape
always, so a context that may have ends of documents, or says for some steps how much of attention
is hidden, travels as wide as if every position were an end.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state
from torch import Tensor, nn

from sedd_scale.config import ModelConfig
from sedd_scale.model.attention import Context
from sedd_scale.model.block import Stream
from sedd_scale.model.head import Head
from sedd_scale.model.network import LayerBuilder
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import ScoreTargets


class _DeferredLayer(LayerSpec):
    """A layer that is built only on the stage that keeps it."""

    def __init__(self, builder: LayerBuilder) -> None:
        super().__init__(nn.Module)
        self.builder = builder

    def build(self, log: bool = False) -> nn.Module:
        return self.builder()


class PipelineStage(PipelineModule):
    """This process's stage; the last one computes the loss from what the head returns."""

    def __init__(
        self,
        builders: list[LayerBuilder],
        model: ModelConfig,
        layout: Layout,
        *,
        causal: bool,
        wide: bool = False,
    ) -> None:
        super().__init__(
            layers=[_DeferredLayer(builder) for builder in builders],
            topology=PipeModelDataParallelTopology(
                num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
            ),
            loss_fn=self._loss,
            partition_method="uniform",
        )
        self.layout = layout
        self.cond_dim = model.cond_width
        self.tied = model.tied_embedding
        self.causal = causal
        self.wide = wide
        self.context_width = 1
        self.sigma_shape = torch.Size()

    def padded(
        self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What `Embedding` takes, for the coming micro-batches, with contexts that can travel.

        Every stage calls it, and so learns how much of them its layers need.
        """
        self.sigma_shape = inputs[0][1].shape
        contexts = [context.view(len(noisy_BL), -1) for noisy_BL, _, context in inputs]
        self.context_width = max(context_BK.shape[1] for context_BK in contexts)
        if self.wide:
            length = inputs[0][0].shape[1]
            contexts = [_widened(context_BK, length) for context_BK in contexts]
        return [
            (noisy_BL, sigma_B, context_BK)
            for (noisy_BL, sigma_B, _), context_BK in zip(inputs, contexts, strict=True)
        ]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """What DeepSpeed adds up gradients of: weights that the first and last stage both have."""
        if not self.tied:
            return []
        embedding, head = self.forward_funcs[0], self.forward_funcs[-1]
        group = parallel_state.get_embedding_group()
        if self.layout.is_first_stage:
            return [(embedding.tokens.weight, group)]
        return [(head.linear.weight, group)] if self.layout.is_last_stage else []

    @property
    def stack(self) -> list[nn.Module]:
        """The stage's layers, in order."""
        return list(self.forward_funcs)

    @property
    def grid(self) -> PipeModelDataParallelTopology:
        """DeepSpeed's own view of the process groups."""
        return self._grid

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """The stage's layers, with what travels unpacked before and packed after them.

        The last stage returns the input of the head's linear map.
        """
        whole_context_BK = inputs[-1]
        context_BK = whole_context_BK[:, : self.context_width]
        if self.layout.is_first_stage:
            outputs = super().forward((*inputs[:-1], context_BK))
        else:
            outputs = super().forward(self._unpack(inputs[0], context_BK))
        if self.layout.is_last_stage:
            return outputs
        hidden_LBH, cond_BC, _ = outputs
        return self._pack(hidden_LBH, cond_BC, whole_context_BK)

    def _pack(
        self, hidden_LBH: Tensor, cond_BC: Tensor, context_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, width = hidden_LBH.shape[1:]
        rows = self._cond_rows(width)
        flat_BX = cond_BC.movedim(-2, 0).flatten(1)
        padded = F.pad(flat_BX, (0, rows * width - flat_BX.shape[1]))
        as_positions = padded.view(batch, rows, width).transpose(0, 1)
        return torch.cat([hidden_LBH, as_positions.to(hidden_LBH.dtype)]), context_BK

    def _unpack(self, packed: Tensor, context_BK: Tensor) -> Stream:
        batch, width = packed.shape[1:]
        length = len(packed) - self._cond_rows(width)
        padded = packed[length:].transpose(0, 1).reshape(batch, -1)
        *segments, _ = self.sigma_shape
        flat_BX = padded[:, : math.prod(segments) * self.cond_dim]
        cond_BC = flat_BX.unflatten(1, (*segments, self.cond_dim)).movedim(0, -2)
        cond_BC = cond_BC.to(next(self.parameters()).dtype)
        return packed[:length], cond_BC, Context.unpacked(context_BK, causal=self.causal)

    def _cond_rows(self, width: int) -> int:
        return -(-math.prod(self.sigma_shape[:-1]) * self.cond_dim // width)

    def _loss(self, hidden_LBH: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        head = self.forward_funcs[-1]
        assert isinstance(head, Head)
        return head.linear(hidden_LBH, ScoreTargets(*labels), per_sequence=not self.training)


def _widened(context_BK: Tensor, length: int) -> Tensor:
    """The context with as many ends of documents as positions; those added are the block's end."""
    wide_BK = F.pad(context_BK, (0, 3 + length - context_BK.shape[1]), value=length)
    return wide_BK.pin_memory() if context_BK.is_pinned() else wide_BK
