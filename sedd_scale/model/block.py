"""One transformer block: Megatron-core attention and MLP under adaLN-zero."""

import functools

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sedd_scale.config import ModelConfig
from sedd_scale.model.adaln import AdaptiveNorm, Modulation, sum_gradient_over_sequence
from sedd_scale.model.attention import BidirectionalAttention
from sedd_scale.model.dropout import keyed_dropout
from sedd_scale.parallel.layout import Layout

Stream = tuple[Tensor, Tensor, Tensor]
"""What flows from layer to layer: hidden_LBH, cond_BC and context_BK.

The context is integers: each sequence's dropout key, then, where attention stays within documents,
the document of each of its positions.
"""


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
        recompute: bool,
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
        self.attention = SelfAttention(
            attention_config,
            SelfAttentionSubmodules(
                linear_qkv=tensor_parallel.ColumnParallelLinear,
                core_attention=functools.partial(BidirectionalAttention, backend=model.attention),
                linear_proj=tensor_parallel.RowParallelLinear,
            ),
            layer_number=index + 1,
            attn_mask_type=AttnMaskType.no_mask,
        )
        self.mlp = MLP(
            mlp_config,
            MLPSubmodules(
                linear_fc1=tensor_parallel.ColumnParallelLinear,
                linear_fc2=tensor_parallel.RowParallelLinear,
            ),
            ffn_hidden_size=mlp_config.ffn_hidden_size,
            tp_group=layout.tensor_group,
        )
        self.rotary = RotaryEmbedding(
            model.hidden_size // model.num_heads, 1.0, use_cpu_initialization=True
        )

    def forward(self, stream: Stream) -> Stream:
        """[L, B, H] to [L, B, H]; L is this rank's share under sequence parallelism."""
        if self.recompute and self.training:
            return checkpoint(self._forward, *stream, use_reentrant=False, preserve_rng_state=False)
        return self._forward(*stream)

    def _forward(self, hidden_LBH: Tensor, cond_BC: Tensor, context_BK: Tensor) -> Stream:
        keys_B, documents_BL = context_BK[:, 0], context_BK[:, 1:]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond_BC)
        length = hidden_LBH.shape[0]
        if self.layout.sequence_parallel:
            length *= self.layout.tensor

        normed = self.norm1(hidden_LBH, shift1, scale1)
        update, _ = self.attention(
            normed,
            attention_mask=documents_BL if documents_BL.numel() else None,
            rotary_pos_emb=self.rotary(length),
        )
        update = gate1 * self._drop(update, keys_B, site=2 * self.index)
        hidden_LBH = (hidden_LBH + update).to(hidden_LBH.dtype)

        normed = self.norm2(hidden_LBH, shift2, scale2)
        update, bias = self.mlp(normed)
        update = update + sum_gradient_over_sequence(bias, self.layout)
        update = gate2 * self._drop(update, keys_B, site=2 * self.index + 1)
        hidden_LBH = (hidden_LBH + update).to(hidden_LBH.dtype)
        return hidden_LBH, cond_BC, context_BK

    def _drop(self, update_LBH: Tensor, keys_B: Tensor, *, site: int) -> Tensor:
        if not (self.training and self.dropout > 0):
            return update_LBH
        first = 0
        if self.layout.sequence_parallel:
            first = update_LBH.shape[0] * self.layout.tensor_rank
        return keyed_dropout(update_LBH, keys_B, rate=self.dropout, site=site, first_position=first)
