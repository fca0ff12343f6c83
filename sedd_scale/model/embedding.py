"""The first layer: noisy tokens and sigma to the residual stream and the conditioning vector."""

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_scale.model.adaln import SigmaEmbedding
from sedd_scale.model.attention import Context
from sedd_scale.model.block import Stream
from sedd_scale.parallel.layout import Layout


class Embedding(nn.Module):
    """Vocabulary-parallel token embedding (one row per state, padded) and the sigma embedding."""

    def __init__(
        self,
        num_states: int,
        padded_states: int,
        cond_dim: int,
        config: TransformerConfig,
        layout: Layout,
        residual_dtype: torch.dtype,
        *,
        time_conditioning: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.logical_name = "embedding"
        self.vocab_rows = {"tokens.weight": num_states}
        self.layout = layout
        self.residual_dtype = residual_dtype
        self.time_conditioning = time_conditioning
        self.causal = causal
        self.tokens = VocabParallelEmbedding(
            padded_states,
            config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=layout.sequence_parallel,
            config=config,
            tp_group=layout.tensor_group,
        )
        self.sigma = SigmaEmbedding(cond_dim)

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Stream:
        """(noisy_BL, sigma_B, context) to (hidden_LBH, cond_BC, context).

        The context comes as the integers of `packed_context`, or the dropout keys_B alone. Without
        time conditioning the conditioning vector is that of sigma 0, whatever sigma is
        (arXiv 2406.03736: the scores of absorb depend on time only through a known factor).
        """
        noisy_BL, sigma_B, context = inputs
        if not self.time_conditioning:
            sigma_B = torch.zeros_like(sigma_B)
        # Under sequence parallelism the lookup itself puts positions first, to scatter them.
        hidden = self.tokens(noisy_BL if self.layout.sequence_parallel else noisy_BL.t())
        unpacked = Context.unpacked(context.view(len(noisy_BL), -1), causal=self.causal)
        return hidden.to(self.residual_dtype), self.sigma(sigma_B), unpacked
