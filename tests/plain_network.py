"""The SEDD transformer in plain PyTorch, one process, parameters under the published names.

Written from the description of the published checkpoints, not from the code under test: it knows
nothing of Megatron-core, tensor ranks, keyed dropout or fused losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, cond_dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
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

    def forward(self, x_BLH: Tensor, cond_BC: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(cond_BC)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        x_BLH = x_BLH + gate1 * self.attention(self.norm1(x_BLH) * (1 + scale1) + shift1)
        return x_BLH + gate2 * self.mlp(self.norm2(x_BLH) * (1 + scale2) + shift2)

    def attention(self, x_BLH: Tensor) -> Tensor:
        batch, length, width = x_BLH.shape
        head_dim = width // self.heads
        qkv = self.attn_qkv(x_BLH).view(batch, length, 3, self.heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q), rotate(k)
        weights = torch.softmax(q @ k.transpose(-1, -2) / head_dim**0.5, dim=-1)
        return self.attn_out((weights @ v).transpose(1, 2).reshape(batch, length, width))


def rotate(x_BhLD: Tensor) -> Tensor:
    """Rotary positions on the two halves of the head dimension."""
    length, dim = x_BhLD.shape[-2:]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x_BhLD.dtype), angle.sin().to(x_BhLD.dtype)
    first, second = x_BhLD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PlainNetwork(nn.Module):
    """Noisy tokens and sigma to the head's raw outputs [B, L, V]."""

    def __init__(
        self,
        *,
        num_states: int,
        width: int,
        layers: int,
        heads: int,
        cond_dim: int,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.empty(num_states, width))
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(
            nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )
        self.blocks = nn.ModuleList(
            PlainBlock(width, heads, cond_dim, mlp_ratio) for _ in range(layers)
        )
        self.output_layer = nn.Module()
        self.output_layer.norm_final = nn.LayerNorm(width, bias=False)
        self.output_layer.adaLN_modulation = nn.Linear(cond_dim, 2 * width)
        self.output_layer.linear = nn.Linear(width, num_states)

    def forward(self, noisy_BL: Tensor, sigma_B: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float32) / 128)
        angle = sigma_B.float()[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        cond_BC = F.silu(self.sigma_map.mlp(features.to(self.vocab_embed.embedding.dtype)))
        x_BLH = self.vocab_embed.embedding[noisy_BL]
        for block in self.blocks:
            x_BLH = block(x_BLH, cond_BC)
        head = self.output_layer
        shift, scale = head.adaLN_modulation(cond_BC)[:, None].chunk(2, dim=-1)
        return head.linear(head.norm_final(x_BLH) * (1 + scale) + shift)
