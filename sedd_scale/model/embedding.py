"""The first layer: noisy tokens and sigma to the residual stream and the conditioning vector."""

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_scale.config import ModelConfig
from sedd_scale.errors import DataError
from sedd_scale.model.adaln import SigmaEmbedding, sum_gradient_over_sequence
from sedd_scale.model.attention import Context, KeyValueCache
from sedd_scale.model.block import Stream
from sedd_scale.parallel.layout import Layout

RESIDUAL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Embedding(nn.Module):
    """Vocabulary-parallel token embedding (one row per state, padded), positions and sigma.

    Attributes:
        cache: keys and values of positions that went before, as in `CoreAttention`.
    """

    cache: KeyValueCache | None

    def __init__(
        self,
        num_states: int,
        padded_states: int,
        model: ModelConfig,
        config: TransformerConfig,
        layout: Layout,
        *,
        time_conditioning: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.logical_name = "embedding"
        self.vocab_rows = {"tokens.weight": num_states}
        self.layout = layout
        self.residual_dtype = RESIDUAL_DTYPES[model.residual_dtype]
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
        self.positions, self.cache = None, None
        if model.positions == "learned":
            assert model.max_positions is not None
            self.positions = LearnedPositions(model.max_positions, model.hidden_size, layout)
        self.sigma = SigmaEmbedding(model.cond_dim) if model.conditioning == "adaln" else None

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
        hidden = hidden.to(self.residual_dtype)
        if self.positions is not None:
            first = self.layout.first_position(len(hidden))
            first += 0 if self.cache is None else self.cache.length
            hidden = hidden + self.positions(first, len(hidden))
        unpacked = Context.unpacked(context.view(len(noisy_BL), -1), causal=self.causal)
        cond_BC = sigma_B[..., None][..., :0].to(self.tokens.weight.dtype)
        if self.sigma is not None:
            cond_BC = self.sigma(sigma_B)
        return hidden, cond_BC, unpacked


class LearnedPositions(nn.Module):
    """A vector for each position."""

    def __init__(self, most: int, width: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(torch.empty(most, width))

    def forward(self, first: int, count: int) -> Tensor:
        """The vectors [count, 1, H] of positions from `first` on.

        Raises:
            DataError: there are not so many.
        """
        if first + count > len(self.weight):
            raise DataError(
                f"a sequence of {first + count} tokens is longer than the model's "
                f"{len(self.weight)} positions (model.max_positions): give a shorter one"
            )
        weight = sum_gradient_over_sequence(self.weight, self.layout)
        return weight[first : first + count, None]
