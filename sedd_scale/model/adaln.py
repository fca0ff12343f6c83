"""Time conditioning: the embedding of the noise level and adaptive layer norm.

L positions (this rank's share under sequence parallelism), B sequences, H hidden width, C width of
the conditioning vector.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from sedd_scale.config import ModelConfig
from sedd_scale.model.fused import modulated_norm
from sedd_scale.parallel.layout import Layout

NUM_FREQUENCIES = 128
MAX_PERIOD = 10_000.0


class SigmaEmbedding(nn.Module):
    """Total noise sigma to a conditioning vector (Lou et al., the DiT time embedding of sigma)."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(2 * NUM_FREQUENCIES, cond_dim)
        self.linear2 = nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma_B: Tensor) -> Tensor:
        """sigma_B (nats of total noise, any float type) to c_BC in the weights' type.

        sigma may have axes before that one, as with segments. The angles are taken in float32
        whatever the weights are.
        """
        index = torch.arange(NUM_FREQUENCIES, dtype=torch.float32, device=sigma_B.device)
        frequency = MAX_PERIOD ** (-index / NUM_FREQUENCIES)
        angle = sigma_B.float()[..., None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        features = features.to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(features))))


class AdaptiveNorm(nn.Module):
    """The norm that a configuration names, then adaLN's shift and scale; computed in float32."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.hidden_size)) if model.norm_bias else None
        self.epsilon, self.centred = model.norm_epsilon, model.norm == "layernorm"
        self.layout = layout

    def forward(
        self, hidden_LBH: Tensor, shift_BH: Tensor | None, scale_BH: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """norm(hidden) * (1 + scale) + shift in the weights' type, and hidden; [L, B, H] each.

        Without a condition both are None. What else uses the stream takes the second, as
        `modulated_norm` says.
        """
        factor = sum_gradient_over_sequence(self.weight, self.layout).float()
        offset = torch.zeros_like(factor)
        if self.bias is not None:
            offset = sum_gradient_over_sequence(self.bias, self.layout).float()
        if scale_BH is None or shift_BH is None:
            each = hidden_LBH.shape[1:]
            factor, offset = factor.expand(each), offset.expand(each)
        else:
            opening_BH = 1 + scale_BH.float()
            factor = factor * opening_BH
            offset = shift_BH if self.bias is None else shift_BH + offset * opening_BH
        return modulated_norm(
            hidden_LBH,
            factor,
            offset,
            epsilon=self.epsilon,
            dtype=self.weight.dtype,
            centred=self.centred,
        )


class Modulation(nn.Module):
    """The linear map from c to the shifts, scales and gates of one layer (zero at the start)."""

    def __init__(self, model: ModelConfig, num_vectors: int, layout: Layout) -> None:
        super().__init__()
        self.linear = nn.Linear(model.cond_dim, num_vectors * model.hidden_size)
        self.num_vectors = num_vectors
        self.layout = layout

    def forward(self, cond_BC: Tensor) -> tuple[Tensor, ...]:
        """c_BC to `num_vectors` tensors of shape [B, H]; of c_SBC those of this rank's segments."""
        vectors = sum_gradient_over_sequence(self.linear(cond_BC), self.layout)
        if vectors.dim() == 3 and self.layout.sequence_parallel:
            segments, rank, ranks = len(vectors), self.layout.tensor_rank, self.layout.tensor
            assert segments % ranks == 0 or ranks % segments == 0, (segments, ranks)
            first = segments * rank // ranks
            vectors = vectors[first : first + max(1, segments // ranks)]
        return vectors.chunk(self.num_vectors, dim=-1)


class NoModulation(nn.Module):
    """In its place in a network without conditioning: no vectors."""

    def __init__(self, num_vectors: int) -> None:
        super().__init__()
        self.num_vectors = num_vectors

    def forward(self, cond_BC: Tensor) -> tuple[None, ...]:
        """A None for each vector."""
        return (None,) * self.num_vectors


def modulation(model: ModelConfig, num_vectors: int, layout: Layout) -> nn.Module:
    """What gives a layer its shifts, scales and gates, as the configuration says."""
    if model.conditioning == "none":
        return NoModulation(num_vectors)
    return Modulation(model, num_vectors, layout)


def sum_gradient_over_sequence(value: Tensor, layout: Layout) -> Tensor:
    """A replicated value, whose gradient becomes the same on all tensor ranks.

    Under sequence parallelism each tensor rank sees only its positions, so the gradient of anything
    replicated is added up over the ranks. Without it each has the whole gradient by itself, from
    the same numbers; but a kernel that one rank's device sums in another order, or a fault, would
    let the replicas drift apart for good: so all take the first rank's.
    """
    if layout.sequence_parallel:
        return sum_gradient(value, layout)
    if layout.tensor > 1:
        result: Tensor = _FirstRanksGradient.apply(value, layout.tensor_group)
        return result
    return value


class _FirstRanksGradient(torch.autograd.Function):
    """The identity; its gradient is that of the group's first rank."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.broadcast(grad, dist.get_process_group_ranks(ctx.group)[0], group=ctx.group)
        return grad, None


def sum_gradient(value: Tensor, layout: Layout) -> Tensor:
    """The same value; its gradient is summed over tensor ranks, whatever its strides are."""
    copied = copy_to_tensor_model_parallel_region(value, group=layout.tensor_group)
    result: Tensor = _ContiguousGradient.apply(copied)
    return result


class _ContiguousGradient(torch.autograd.Function):
    """The identity. Of a gradient with gaps Megatron-core sums a copy and returns the original."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
