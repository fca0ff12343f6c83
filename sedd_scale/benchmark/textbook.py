"""The straightforward training step: what the benchmarks compare with.

A plain PyTorch transformer under the published parameter names, log-scores of every row over the
whole vocabulary, score entropy as the paper writes it, gradients by autograd, torch's AdamW and an
average of the weights in a Python loop. Nothing of the rest of the package takes part but the
configuration, the graph and the noisy batch, so that both sides see the same work.

B sequences, L positions, H width, h heads, D head width, V states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_scale.benchmark.loss import textbook_loss
from sedd_scale.config import Config
from sedd_scale.diffusion.corruption import NoisyBatch
from sedd_scale.diffusion.graphs import Graph


class TextbookBlock(nn.Module):
    """A transformer block under adaLN-zero (Lou et al., appendix on architecture)."""

    def __init__(
        self, width: int, num_heads: int, cond_dim: int, mlp_ratio: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(mlp_ratio * width, width),
        )
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * width)

    def forward(self, x_BLH: Tensor, cond_BC: Tensor, rotary_2LD: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(cond_BC)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        update = self.attention(self.norm1(x_BLH) * (1 + scale1) + shift1, rotary_2LD)
        x_BLH = x_BLH + gate1 * F.dropout(update, self.dropout, self.training)
        update = self.mlp(self.norm2(x_BLH) * (1 + scale2) + shift2)
        return x_BLH + gate2 * F.dropout(update, self.dropout, self.training)

    def attention(self, x_BLH: Tensor, rotary_2LD: Tensor) -> Tensor:
        """Bidirectional attention over all positions with rotary positions on q and k."""
        batch, length, width = x_BLH.shape
        qkv = self.attn_qkv(x_BLH).view(batch, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        output_BhLD = F.scaled_dot_product_attention(
            rotated(q, rotary_2LD), rotated(k, rotary_2LD), v
        )
        return self.attn_out(output_BhLD.transpose(1, 2).reshape(batch, length, width))


def rotated(x_BhLD: Tensor, rotary_2LD: Tensor) -> Tensor:
    """Rotary positions on the two halves of the head dimension."""
    cos, sin = rotary_2LD.to(x_BhLD.dtype)
    first, second = x_BhLD.chunk(2, dim=-1)
    return x_BhLD * cos + torch.cat([-second, first], dim=-1) * sin


class VocabEmbedding(nn.Module):
    """A row of numbers for each state."""

    def __init__(self, num_states: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(num_states, width))
        nn.init.kaiming_uniform_(self.embedding, a=5**0.5)


class SigmaMap(nn.Module):
    """Total noise to the conditioning vector."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma_B: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(128, device=sigma_B.device) / 128)
        angle = sigma_B.float()[:, None] * frequency
        return F.silu(self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1)))


class OutputLayer(nn.Module):
    """The adaptive norm before the map to scores, and the map."""

    def __init__(self, width: int, cond_dim: int, num_states: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, bias=False)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * width)
        self.linear = nn.Linear(width, num_states)

    def forward(self, x_BLH: Tensor, cond_BC: Tensor) -> Tensor:
        """The input of `linear`."""
        shift, scale = self.adaLN_modulation(cond_BC)[:, None].chunk(2, dim=-1)
        return self.norm_final(x_BLH) * (1 + scale) + shift


class TextbookNetwork(nn.Module):
    """Noisy tokens and sigma to the input [B, L, H] of `output_layer.linear`, the map to scores."""

    def __init__(self, config: Config, num_states: int) -> None:
        super().__init__()
        model = config.model
        width, cond_dim = model.hidden_size, model.cond_dim
        self.head_dim = config.trunk.head_dim
        self.vocab_embed = VocabEmbedding(num_states, width)
        self.sigma_map = SigmaMap(cond_dim)
        self.blocks = nn.ModuleList(
            TextbookBlock(width, model.num_heads, cond_dim, model.mlp_ratio, model.dropout)
            for _ in range(model.num_layers)
        )
        self.output_layer = OutputLayer(width, cond_dim, num_states)

    def forward(self, noisy_BL: Tensor, sigma_B: Tensor) -> Tensor:
        cond_BC = self.sigma_map(sigma_B)
        x_BLH = self.vocab_embed.embedding[noisy_BL]
        rotary_2LD = rotary_table(noisy_BL.shape[1], self.head_dim, noisy_BL.device)
        for block in self.blocks:
            x_BLH = block(x_BLH, cond_BC, rotary_2LD)
        output: Tensor = self.output_layer(x_BLH, cond_BC)
        return output


def rotary_table(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary angles, [2, L, D]."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2)


class TextbookTrainer:
    """The whole step around it: float32 weights, or autocast to bfloat16 over them."""

    def __init__(
        self, config: Config, graph: Graph, device: torch.device, *, bf16: bool = False
    ) -> None:
        self.config, self.graph, self.device, self.bf16 = config, graph, device, bf16
        self.network = TextbookNetwork(config, graph.num_states).to(device)
        optimizer = config.optimizer
        self.adam = torch.optim.AdamW(
            self.network.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.averages = [weight.detach().clone() for weight in self.network.parameters()]
        self.num_updates = 0

    def loss(self, batch: NoisyBatch) -> Tensor:
        """Mean score entropy of a noisy batch, nats per token; differentiable."""
        noise_B3 = torch.stack([batch.sigma_B, batch.rate_B, batch.rate_over_expm1_B], dim=1)
        noisy_BL, clean_BL, noise_B3 = (
            tensor.to(self.device) for tensor in (batch.noisy_BL, batch.clean_BL, noise_B3)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            x_BLH = self.network(noisy_BL, noise_B3[:, 0])
            linear = self.network.output_layer.linear
            return textbook_loss(
                x_BLH.transpose(0, 1),
                linear.weight,
                linear.bias,
                clean_BL,
                noisy_BL,
                noise_B3,
                graph=self.graph,
                scaled=self.config.resolved_scale_by_sigma,
            )

    def step(self, batch: NoisyBatch, *, lr: float) -> tuple[float, float]:
        """One optimizer step; the loss (nats per token) and the gradient norm before clipping."""
        optimizer = self.config.optimizer
        self.adam.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), optimizer.clip)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.num_updates += 1
        update_averages(
            self.averages, list(self.network.parameters()), optimizer.ema_decay, self.num_updates
        )
        return float(loss.detach()), float(norm)


@torch.no_grad()
def update_averages(
    averages: list[Tensor], weights: list[nn.Parameter], ema_decay: float, num_updates: int
) -> None:
    """Exponential moving average of the weights, a parameter at a time."""
    decay = min(ema_decay, (1 + num_updates) / (10 + num_updates))
    for average, weight in zip(averages, weights):
        average.sub_((1.0 - decay) * (average - weight))
