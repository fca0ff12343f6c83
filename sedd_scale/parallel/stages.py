"""The list of layers as DeepSpeed pipeline stages.

Between stages travel one floating-point tensor, the hidden states with the conditioning vector
appended as further positions, and the integers of the context: DeepSpeed runs a backward pass for
each floating-point tensor, so one is better than two.
"""

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

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

    def __init__(self, builders: list[LayerBuilder], cond_dim: int, layout: Layout) -> None:
        super().__init__(
            layers=[_DeferredLayer(builder) for builder in builders],
            topology=PipeModelDataParallelTopology(
                num_pp=layout.pipeline, num_mp=layout.tensor, num_dp=layout.data
            ),
            loss_fn=self._loss,
            partition_method="uniform",
        )
        self.layout = layout
        self.cond_dim = cond_dim

    @property
    def grid(self) -> PipeModelDataParallelTopology:
        """DeepSpeed's own view of the process groups."""
        return self._grid

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | Tensor:
        """The stage's layers, with what travels unpacked before and packed after them.

        The last stage returns the input of the head's linear map.
        """
        if not self.layout.is_first_stage:
            inputs = self._unpack(*inputs)
        outputs = super().forward(inputs)
        return outputs if self.layout.is_last_stage else self._pack(*outputs)

    def _pack(
        self, hidden_LBH: Tensor, cond_BC: Tensor, context_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, width = hidden_LBH.shape[1:]
        rows = self._cond_rows(width)
        padded = F.pad(cond_BC, (0, rows * width - self.cond_dim))
        as_positions = padded.view(batch, rows, width).transpose(0, 1)
        return torch.cat([hidden_LBH, as_positions.to(hidden_LBH.dtype)]), context_BK

    def _unpack(self, packed: Tensor, context_BK: Tensor) -> Stream:
        batch, width = packed.shape[1:]
        length = len(packed) - self._cond_rows(width)
        padded = packed[length:].transpose(0, 1).reshape(batch, -1)
        cond_BC = padded[:, : self.cond_dim].to(next(self.parameters()).dtype)
        return packed[:length], cond_BC, context_BK

    def _cond_rows(self, width: int) -> int:
        return -(-self.cond_dim // width)

    def _loss(self, hidden_LBH: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        head = self.forward_funcs[-1]
        assert isinstance(head, Head)
        return head.linear(hidden_LBH, ScoreTargets(*labels), per_sequence=not self.training)
