"""One transformer block: Megatron-core attention and MLP under adaLN-zero."""

import dataclasses
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
from sedd_scale.config.trunk import GATE_PARTS
from sedd_scale.model.adaln import (
    AdaptiveNorm,
    modulation,
    sum_gradient,
    sum_gradient_over_sequence,
)
from sedd_scale.model.attention import Context, CoreAttention, is_installed
from sedd_scale.model.dropout import Dropout, dropout
from sedd_scale.model.fused import gated_residual, mlp_activation, rotated_query_key_value
from sedd_scale.model.parameters import holds_parts
from sedd_scale.model.rotary import RotaryAngles, rotary_table
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
        weight: of the norms of queries and keys, one under the other, where there are such. Under
            ZeRO 3 it is whole here, and would not be in a module of its own.
    """

    weight: nn.Parameter | None

    def with_model(self, model: ModelConfig, layout: Layout) -> "RotarySelfAttention":
        """Itself, told what Megatron-core's configuration has no words for."""
        self.angles, self.layout, self.epsilon = RotaryAngles.of(model), layout, model.norm_epsilon
        width, self.weight = self.hidden_size_per_attention_head, None
        if model.qk_norm:
            self.weight = nn.Parameter(torch.empty(2 * width))
            holds_parts(self.weight, {"q_norm": width, "k_norm": width})
        return self

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[L, B, h, D] each, for this rank's heads; L is whole under sequence parallelism."""
        mixed, _ = self.linear_qkv(hidden_states)
        width = self.hidden_size_per_attention_head
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1, width))
        first, last = self.core_attention.places(len(mixed))
        cos, sin = (
            part[first : first + len(mixed)]
            for part in rotary_table(last, width, self.angles, mixed.dtype, mixed.device)
        )
        weights: Tensor | None = self.weight
        if weights is not None and self.layout.tensor > 1:
            weights = sum_gradient(weights, self.layout)  # each rank has other heads
        return rotated_query_key_value(mixed, cos, sin, weights, self.epsilon)


class UnsharedRowParallelLinear(tensor_parallel.RowParallelLinear):
    """Megatron-core's row-parallel map, for selective recomputation.

    The sum over tensor ranks overwrites the product it is given; here it is given a copy, so that
    the product kept for the recomputation is not summed twice.
    """

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
        product: Tensor = super()._forward_impl(*args, **kwargs)
        return product.clone()


class FusedMLP(MLP):
    """Megatron-core's MLP with its first bias and its activation in one pass.

    `overwrite` is to be off where the first product is kept for a recomputation.
    """

    overwrite = True
    activation: str

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """[L, B, H] to [L, B, H] and the bias that is still to be added."""
        inner, bias = self.linear_fc1(hidden_states)
        inner = mlp_activation(inner, bias, self.activation, overwrite=self.overwrite)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(inner)
        return output


def _with_bias(has_bias: bool, kind: type[nn.Module], *sizes: int, **rest: Any) -> nn.Module:
    """A layer with the bias that the model has, whatever Megatron-core's own rule is."""
    return kind(*sizes, **{**rest, "bias": has_bias})


class Block(nn.Module):
    """x += gate1 drop(attn(norm1(x))); x += gate2 drop(mlp(norm2(x))), both norms adaptive.

    Source: Lou et al., section on architecture (DiT blocks with rotary positions); the parameters
    correspond one to one to a block of the published checkpoints.
    """

    def __init__(
        self,
        index: int,
        model: ModelConfig,
        config: TransformerConfig,
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
        self.norm1 = AdaptiveNorm(model, layout)
        self.norm2 = AdaptiveNorm(model, layout)
        self.modulation = modulation(model, 6, layout)
        column_linear = tensor_parallel.ColumnParallelLinear
        row_linear = tensor_parallel.RowParallelLinear
        if recompute == "selective":
            row_linear = UnsharedRowParallelLinear
        self.attention = RotarySelfAttention(
            dataclasses.replace(config, add_bias_linear=model.attention_out_bias),
            SelfAttentionSubmodules(
                linear_qkv=functools.partial(_with_bias, model.qkv_bias, column_linear),
                core_attention=functools.partial(CoreAttention, backend=model.attention),
                linear_proj=row_linear,
            ),
            layer_number=index + 1,
            attn_mask_type=AttnMaskType.no_mask,
        ).with_model(model, layout)
        self.mlp = FusedMLP(
            config,
            MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=layout.tensor_group,
        )
        self.mlp.activation = model.activation
        self.mlp.overwrite = recompute != "selective"
        if config.gated_linear_unit:
            for parameter in self.mlp.linear_fc1.parameters():
                holds_parts(parameter, dict.fromkeys(GATE_PARTS, len(parameter) // 2))

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
        sequence_M = rows_M // (batch * length // segments) * batch + rows_M % batch
        of_row = [
            part if part is None else part.flatten(0, -2).index_select(0, sequence_M)
            for part in vectors[3:]
        ]
        cond_MC = cond_BC.flatten(0, -2).index_select(0, sequence_M)
        context = context._replace(keys_B=context.keys_B.index_select(0, rows_M % batch))
        return self._feed(hidden_1MH, of_row, context), cond_MC, context

    def _forward(self, hidden_LBH: Tensor, cond_BC: Tensor, context: Context) -> Stream:
        vectors = self.modulation(cond_BC)
        hidden_LBH = self._attend(hidden_LBH, vectors[:3], context)
        return self._feed(hidden_LBH, vectors[3:], context), cond_BC, context

    def _attend(
        self, hidden_LBH: Tensor, vectors: Sequence[Tensor | None], context: Context
    ) -> Tensor:
        shift_BH, scale_BH, gate_BH = vectors
        normed, hidden_LBH = self.norm1(hidden_LBH, shift_BH, scale_BH)
        update, bias = self.attention(normed, attention_mask=context.pattern)
        return self._added(hidden_LBH, update, bias, gate_BH, context, site=2 * self.index)

    def _feed(
        self, hidden_LBH: Tensor, vectors: Sequence[Tensor | None], context: Context
    ) -> Tensor:
        shift_BH, scale_BH, gate_BH = vectors
        normed, hidden_LBH = self.norm2(hidden_LBH, shift_BH, scale_BH)
        update, bias = self.mlp(normed)
        return self._added(hidden_LBH, update, bias, gate_BH, context, site=2 * self.index + 1)

    def _added(
        self,
        hidden_LBH: Tensor,
        update_LBH: Tensor,
        bias_H: Tensor | None,
        gate_BH: Tensor | None,
        context: Context,
        *,
        site: int,
    ) -> Tensor:
        if bias_H is not None:
            bias_H = sum_gradient_over_sequence(bias_H, self.layout)
        dropped = self._dropout(hidden_LBH, context.keys_B, site=site)
        return gated_residual(hidden_LBH, update_LBH, gate_BH, bias_H=bias_H, dropout=dropped)

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
