"""One transformer block: Megatron-core attention and MLP under adaLN-zero."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from sedd_scale.config import ModelConfig
from sedd_scale.model.adaln import AdaptiveNorm, Modulation, sum_gradient_over_sequence
from sedd_scale.model.attention import Context, CoreAttention, is_installed
from sedd_scale.model.dropout import Dropout, dropout
from sedd_scale.model.fused import (
    bias_gelu,
    gated_residual,
    rotary_table,
    rotated_query_key_value,
)
from sedd_scale.parallel.layout import Layout

Stream = tuple[Tensor, Tensor, Context]
"""What flows from layer to layer: hidden_LBH, cond_BC and the sequences' context."""


# What selective recomputation keeps: matrix products and attention, whatever backend runs it.
_ATEN = torch.ops.aten
_COSTLY = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.matmul.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]


@functools.cache
def costly() -> list[Any]:
    """What selective recomputation keeps, with the attention of packages as far as it is there."""
    from torch.nn.attention import varlen  # registers its operation

    assert varlen is not None
    found = [*_COSTLY, torch.ops.torch_attn._varlen_attn.default]
    if is_installed("flash_attn"):
        import flash_attn  # registers its own

        assert flash_attn is not None
        for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"):
            operation = getattr(torch.ops.flash_attn, name, None)
            if operation is not None:
                found.append(operation.default)
    return found


class RotarySelfAttention(SelfAttention):
    """Megatron-core's self-attention with rotary positions applied where q, k and v are made.

    Attributes:
        rotary_base: see `rotary_table`.
    """

    rotary_base: float

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[L, B, h, D] each, for this rank's heads; L is whole under sequence parallelism."""
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.unflatten(-1, (-1, 3, self.hidden_size_per_attention_head))
        first, last = self.core_attention.places(len(mixed))
        width = self.hidden_size_per_attention_head
        table = rotary_table(last, width, self.rotary_base, mixed.dtype, mixed.device)
        return rotated_query_key_value(mixed, *(part[first : first + len(mixed)] for part in table))


class UnsharedRowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron-core's row-parallel map, for selective recomputation.

    The sum over tensor ranks overwrites the product it is given; here it is given a copy, so that
    the product kept for the recomputation is not summed twice.
    """

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        product: Tensor = super()._forward_impl(*args, **kwargs)
        return product.clone()


class BiasGeluMLP(MLP):
    """Megatron-core's MLP with its first bias and its GELU in one pass.

    `overwrite` is to be off where the first product is kept for a recomputation.
    """

    overwrite = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[L, B, H] to [L, B, H] and the bias that is still to be added."""
        inner, bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor] = self.linear_fc2(
            bias_gelu(inner, bias, overwrite=self.overwrite)
        )
        return output


class Block(nn.Module):
    """x += gate1 drop(attn(norm1(x))); x += gate2 drop(mlp(norm2(x))), both norms adaptive.

    Source: Lou et al., section on architecture (DiT blocks with rotary positions); the parameters
    correspond one to one to a block of the published checkpoints.
    """

    def __init__(
        self,
        index: int,
        model: ModelConfig,
        attention_config: TransformerConfig,
        mlp_config: TransformerConfig,
        layout: Layout,
        *,
        recompute: str | None,
    ) -> None:
        super().__init__()
        self.logical_name = f"blocks.{index}"
        self.index = index
        self.dropout = model.dropout
        self.layout = layout
        self.recompute = recompute
        self.norm1 = AdaptiveNorm(model.hidden_size, layout)
        self.norm2 = AdaptiveNorm(model.hidden_size, layout)
        self.modulation = Modulation(model.cond_dim, model.hidden_size, 6, layout)
        row_linear = tensor_parallel.RowParallelLinear
        if recompute == "selective":
            row_linear = UnsharedRowParallelLinear
        self.attention = RotarySelfAttention(
            attention_config,
            SelfAttentionSubmodules(
                linear_qkv=tensor_parallel.ColumnParallelLinear,
                core_attention=functools.partial(CoreAttention, backend=model.attention),
                linear_proj=row_linear,
            ),
            layer_number=index + 1,
            attn_mask_type=AttnMaskType.no_mask,
        )
        self.attention.rotary_base = model.rotary_base
        self.mlp = BiasGeluMLP(
            mlp_config,
            MLPSubmodules(
                linear_fc1=tensor_parallel.ColumnParallelLinear,
                linear_fc2=row_linear,
            ),
            ffn_hidden_size=mlp_config.ffn_hidden_size,
            tp_group=layout.tensor_group,
        )
        self.mlp.overwrite = recompute != "selective"

    def forward(self, stream: Stream) -> Stream:
        """[L, B, H] to [L, B, H]; L is this rank's share under sequence parallelism."""
        if self.recompute is None or not self.training:
            return self._forward(*stream)
        contexts = noop_context_fn
        if self.recompute == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, costly())
        return checkpoint(
            self._forward,
            *stream,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )

    def of_rows(self, stream: Stream, rows_M: Tensor) -> Stream:
        """`forward` at some positions only, in eval mode: the MLP runs for no others.

        Args:
            stream: whole sequences, without sequence parallelism.
            rows_M: indices into the flattened [L * B] positions.

        Returns:
            The rows as M sequences of one position: [1, M, H], with the condition of each.
        """
        hidden_LBH, cond_BC, context = stream
        vectors = self.modulation(cond_BC)
        hidden_LBH = self._attend(hidden_LBH, vectors[:3], context)
        length, batch, _ = hidden_LBH.shape
        hidden_1MH = hidden_LBH.flatten(0, 1).index_select(0, rows_M)[None]
        segments = 1 if cond_BC.dim() == 2 else len(cond_BC)
        segment_M = rows_M // (batch * length // segments)
        cond_MC, *of_row = (
            part.flatten(0, -2).index_select(0, segment_M * batch + rows_M % batch)
            for part in (cond_BC, *vectors[3:])
        )
        context = context._replace(keys_B=context.keys_B.index_select(0, rows_M % batch))
        return self._feed(hidden_1MH, of_row, context), cond_MC, context

    def _forward(self, hidden_LBH: Tensor, cond_BC: Tensor, context: Context) -> Stream:
        vectors = self.modulation(cond_BC)
        hidden_LBH = self._attend(hidden_LBH, vectors[:3], context)
        return self._feed(hidden_LBH, vectors[3:], context), cond_BC, context

    def _attend(self, hidden_LBH: Tensor, vectors: Sequence[Tensor], context: Context) -> Tensor:
        shift_BH, scale_BH, gate_BH = vectors
        normed, hidden_LBH = self.norm1(hidden_LBH, shift_BH, scale_BH)
        update, _ = self.attention(normed, attention_mask=context.pattern)
        dropped = self._dropout(hidden_LBH, context.keys_B, site=2 * self.index)
        return gated_residual(hidden_LBH, update, gate_BH, dropout=dropped)

    def _feed(self, hidden_LBH: Tensor, vectors: Sequence[Tensor], context: Context) -> Tensor:
        shift_BH, scale_BH, gate_BH = vectors
        normed, hidden_LBH = self.norm2(hidden_LBH, shift_BH, scale_BH)
        update, bias = self.mlp(normed)
        dropped = self._dropout(hidden_LBH, context.keys_B, site=2 * self.index + 1)
        return gated_residual(
            hidden_LBH,
            update,
            gate_BH,
            bias_H=sum_gradient_over_sequence(bias, self.layout),
            dropout=dropped,
        )

    def _dropout(self, hidden_LBH: Tensor, keys_B: Tensor, *, site: int) -> Dropout | None:
        if not (self.training and self.dropout > 0):
            return None
        length, _, width = hidden_LBH.shape
        return dropout(
            keys_B,
            length=length,
            width=width,
            rate=self.dropout,
            site=site,
            first_position=self.layout.first_position(length),
        )
