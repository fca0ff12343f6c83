"""The score network as a list of layers: embedding, blocks, head.

A pipeline takes the list and keeps its stage's part; everything else runs it whole.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_scale.config import Config, ModelConfig, TrunkShape
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.objectives import make_objective
from sedd_scale.diffusion.row_law import law_of
from sedd_scale.model.attention import CoreAttention, KeyValueCache, packed_context
from sedd_scale.model.block import Block, Stream
from sedd_scale.model.embedding import Embedding
from sedd_scale.model.head import Head
from sedd_scale.model.parameters import (
    copied_name,
    initialize_parameters,
    split_over_tensor_ranks,
)
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import ScoreTargets

LayerBuilder = Callable[[], nn.Module]


def layer_builders(config: Config, graph: Graph, layout: Layout) -> list[LayerBuilder]:
    """One builder a layer; calling it makes the layer with its initial weights (on the CPU).

    The weights are float32 and the same under every layout; an engine casts them.
    """
    model, parallel, objective = config.model, config.parallel, make_objective(config)
    transformer = _transformer_config(model, layout)
    padded_states = -(-graph.num_states // layout.tensor) * layout.tensor

    def embedding() -> nn.Module:
        return Embedding(
            graph.num_states,
            padded_states,
            model,
            transformer,
            layout,
            time_conditioning=model.time_conditioning and not objective.causal,
            causal=objective.causal,
        )

    def block(index: int) -> nn.Module:
        every = parallel.recompute_every
        return Block(
            index,
            model,
            transformer,
            layout,
            recompute=parallel.recompute_mode if every > 0 and index % every == 0 else None,
        )

    def head() -> nn.Module:
        law = law_of(config, graph, cross_entropy=objective.cross_entropy)
        shift = config.training.shift
        return Head(law, padded_states, model, transformer, layout, shift=shift)

    def initialized(build: LayerBuilder) -> nn.Module:
        layer = build()
        _mark_split_parameters(layer)
        initialize_parameters(
            layer,
            layout,
            seed=config.training.seed,
            zero_init=model.zero_init,
            open_gates=model.adaln_gate_init == "one",
        )
        return layer

    builders: list[LayerBuilder] = [embedding]
    builders += [functools.partial(block, index) for index in range(model.num_layers)]
    builders += [head]
    return [functools.partial(initialized, build) for build in builders]


def _transformer_config(model: ModelConfig, layout: Layout) -> TransformerConfig:
    """What Megatron-core's layers are told; biases are those of the feed-forward layers."""
    trunk = TrunkShape.of(model)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=trunk.width,
        num_attention_heads=trunk.heads,
        num_query_groups=trunk.kv_heads,
        kv_channels=trunk.head_dim,
        ffn_hidden_size=trunk.inner,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        activation_func=functools.partial(F.gelu, approximate="tanh"),
        add_bias_linear=trunk.mlp_bias,
        gated_linear_unit=trunk.gated,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        params_dtype=torch.float32,
    )


def _mark_split_parameters(layer: nn.Module) -> None:
    for module in layer.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            split_over_tensor_ranks(module.weight, 0)
        elif isinstance(module, RowParallelLinear):
            split_over_tensor_ranks(module.weight, 1)


class ScoreNetwork(nn.Module):
    """The whole list of layers in one process (of a tensor-parallel group)."""

    def __init__(self, builders: list[LayerBuilder]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build() for build in builders)
        if copied_name(self.head.linear.weight) is not None:
            embedding = self.layers[0]
            assert isinstance(embedding, Embedding)
            self.head.linear.weight = embedding.tokens.weight

    @property
    def stack(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(self.layers)

    @property
    def head(self) -> Head:
        """The last layer."""
        head = self.layers[-1]
        assert isinstance(head, Head)
        return head

    def forward(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        targets: ScoreTargets,
        per_sequence: bool = False,
    ) -> Tensor:
        """Score entropy of a noisy batch: mean nats per token, or nats of each sequence [B].

        Args:
            inputs: noisy_BL, sigma_B and the packed context, as `Embedding` takes them.
        """
        return self.head.loss(self._stream(inputs), targets, per_sequence=per_sequence)

    @contextlib.contextmanager
    def caching(self, capacity: int) -> Iterator[None]:
        """Inside, `hidden` of a causal network takes the next positions, `capacity` in all."""
        cores = [module for module in self.modules() if isinstance(module, CoreAttention)]
        for core in cores:
            core.cache = KeyValueCache(capacity)
        embedding = self.layers[0]
        assert isinstance(embedding, Embedding)
        embedding.cache = cores[0].cache
        try:
            yield
        finally:
            embedding.cache = None
            for core in cores:
                core.cache = None

    def hidden(self, noisy_BL: Tensor, sigma_B: Tensor, ends_BE: Tensor | None = None) -> Tensor:
        """The head's input [L, B, H] for noisy tokens at noise sigma.

        Args:
            ends_BE: where each sequence's documents end, for attention within documents.
        """
        no_keys_B = torch.zeros_like(noisy_BL[:, 0])
        return self.head_input((noisy_BL, sigma_B, packed_context(no_keys_B, ends_BE)))

    def hidden_of_rows(
        self,
        noisy_BL: Tensor,
        sigma_B: Tensor,
        rows_M: Tensor,
        ends_BE: Tensor | None = None,
    ) -> Tensor:
        """`hidden` at chosen positions only, [M, H], in eval mode.

        Args:
            rows_M: indices into the flattened [B * L] positions.
        """
        batch, length = noisy_BL.shape
        rows_M = rows_M % length * batch + rows_M // length
        last = self.layers[-2]
        assert isinstance(last, Block), last
        if self.head.layout.sequence_parallel or length == 1:
            hidden_LBH = self.hidden(noisy_BL, sigma_B, ends_BE)
            return hidden_LBH.flatten(0, 1).index_select(0, rows_M)
        context_BK = packed_context(torch.zeros_like(noisy_BL[:, 0]), ends_BE)
        stream = self.layers[0]((noisy_BL, sigma_B, context_BK))
        for layer in self.layers[1:-2]:
            stream = layer(stream)
        hidden_1MH: Tensor = self.head(last.of_rows(stream, rows_M))
        return hidden_1MH[0]

    def head_input(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same of all that `Embedding` takes."""
        noisy_BL, sigma_B, context = inputs
        hidden_LBH: Tensor = self.head(self._stream((noisy_BL, sigma_B, context)))
        return hidden_LBH

    def _stream(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Stream:
        stream: Stream = self.layers[0](inputs)
        for layer in self.layers[1:-1]:
            stream = layer(stream)
        return stream
