"""The whole network against the same transformer written in plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_scale.diffusion.graphs import Absorb, Graph, make_graph
from sedd_scale.diffusion.score_entropy import (
    RowNoise,
    log_score_score_entropy,
    log_scores_from_logits,
)
from sedd_scale.interop.published import to_published
from sedd_scale.model.network import ScoreNetwork
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import Layout, initialize_layout
from tests.model.small_network import gradients, noisy_batch, relative, small_network

HIDDEN, HEADS, COND, BLOCKS = 32, 4, 24, 2
KINDS = [("absorb", True), ("absorb", False), ("uniform", False)]


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


class PlainNorm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = F.layer_norm(x, (HIDDEN,), self.weight, eps=1e-5)
        return normed * (1 + scale[:, None]) + shift[:, None]


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = PlainNorm()
        self.attn_qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.attn_out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm2 = PlainNorm()
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU("tanh"), nn.Linear(4 * HIDDEN, HIDDEN)
        )
        self.adaLN_modulation = nn.Linear(COND, 6 * HIDDEN)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(cond).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(self.norm1(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(self.norm2(x, shift2, scale2))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.attn_qkv(x).view(batch, length, 3, HEADS, HIDDEN // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = rotated(query) @ rotated(key).transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)
        mixed = scores.softmax(dim=-1) @ value
        return self.attn_out(mixed.transpose(1, 2).reshape(batch, length, HIDDEN))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: the pair (i, i + half) turns by position * 10000^(-i / half)."""
    length, dim = x.shape[-2:]
    half = dim // 2
    turn = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    cos, sin = turn.cos(), turn.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class PlainNetwork(nn.Module):
    """Logits [B, L, V]; submodules carry the names of the published checkpoints."""

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.vocab_embed = nn.Module()
        self.vocab_embed.embedding = nn.Parameter(torch.empty(num_states, HIDDEN))
        self.sigma_map = nn.Module()
        self.sigma_map.mlp = nn.Sequential(nn.Linear(256, COND), nn.SiLU(), nn.Linear(COND, COND))
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(BLOCKS))
        self.output_layer = nn.Module()
        self.output_layer.norm_final = PlainNorm()
        self.output_layer.adaLN_modulation = nn.Linear(COND, 2 * HIDDEN)
        self.output_layer.linear = nn.Linear(HIDDEN, num_states)

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor) -> Tensor:
        angle = sigma_B[:, None] * 10_000.0 ** (-torch.arange(128) / 128)
        cond = F.silu(self.sigma_map.mlp(torch.cat([angle.cos(), angle.sin()], dim=1)))
        x = self.vocab_embed.embedding[tokens_BL]
        for block in self.blocks:
            x = block(x, cond)
        shift, scale = self.output_layer.adaLN_modulation(cond).chunk(2, dim=1)
        return self.output_layer.linear(self.output_layer.norm_final(x, shift, scale))


def plain_copy(network: ScoreNetwork, graph: Graph, layout: Layout) -> PlainNetwork:
    weights = {p.name: p.parameter.detach() for p in logical_parameters(network, layout)}
    plain = PlainNetwork(graph.num_states)
    plain.load_state_dict(to_published(weights, num_layers=BLOCKS, num_heads=HEADS))
    return plain


def plain_losses(
    plain: PlainNetwork, graph: Graph, scaled: bool, noisy_BL: Tensor, clean_BL: Tensor,
    noise_B3: Tensor,
) -> Tensor:  # fmt: skip
    """Nats of each position, by the definition on whole log-scores."""
    noise = RowNoise(*noise_B3.unbind(1))
    log_score_BLV = log_scores_from_logits(
        plain(noisy_BL, noise.sigma.float()), noisy_BL, noise.sigma, graph=graph, scaled=scaled
    )
    return log_score_score_entropy(log_score_BLV, noisy_BL, clean_BL, noise, graph=graph)


@pytest.mark.parametrize("recompute_every", [0, 1])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_a_plain_transformer_gives_the_same(
    layout: Layout, name: str, scaled: bool, recompute_every: int
) -> None:
    graph = make_graph(name, 50)
    network = small_network(graph, layout, scaled=scaled, recompute_every=recompute_every)
    plain = plain_copy(network, graph, layout)
    inputs, targets, clean_BL = noisy_batch(graph, batch=4, length=12)
    noisy_BL, sigma_B, _ = inputs

    with torch.no_grad():
        hidden_LBH = network.hidden(noisy_BL, sigma_B)
        logits_LBV = network.head.logits(hidden_LBH.flatten(0, 1)).view(12, 4, -1)
        expected_BLV = plain(noisy_BL, sigma_B)
    assert relative(logits_LBV.transpose(0, 1), expected_BLV) < 1e-5

    expected_BL = plain_losses(plain, graph, scaled, noisy_BL, clean_BL, targets.noise_B3)
    loss = network(inputs, targets)
    torch.testing.assert_close(loss, expected_BL.mean().to(loss.dtype), rtol=1e-5, atol=0.0)
    loss_B = network(inputs, targets, per_sequence=True)
    torch.testing.assert_close(loss_B, expected_BL.sum(1).to(loss.dtype), rtol=1e-5, atol=0.0)

    weights_B = torch.tensor([1.0, -0.5, 2.0, 0.25])
    for found_loss, expected_loss in (
        (loss, expected_BL.mean()),
        ((weights_B * loss_B).sum(), (weights_B * expected_BL.sum(1)).sum()),
    ):
        network.zero_grad()
        plain.zero_grad()
        found_loss.backward()
        expected_loss.backward(retain_graph=True)
        found = to_published(gradients(network, layout), num_layers=BLOCKS, num_heads=HEADS)
        for key, parameter in plain.named_parameters():
            assert parameter.grad.norm() > 0, key
            assert relative(found[key], parameter.grad) < 1e-4, key


def test_attention_reads_both_ways(layout: Layout) -> None:
    """A token changed anywhere changes the logits everywhere."""
    graph = Absorb(50)
    network = small_network(graph, layout, scaled=True)
    inputs, _, _ = noisy_batch(graph, batch=1, length=8)
    base = network.hidden(*inputs[:2])
    for position in range(8):
        changed = inputs[0].clone()
        changed[0, position] = (changed[0, position] + 1) % 50
        moved = network.hidden(changed, inputs[1]) - base
        assert (moved.abs().amax(dim=(1, 2)) > 1e-6).all(), position


def test_at_the_start_scores_are_flat_and_the_loss_is_0_999_ln_n(layout: Layout) -> None:
    """A zero head under absorb and the log-linear schedule: ln N / t at each masked position."""
    num_tokens = 50
    graph = Absorb(num_tokens)
    network = small_network(graph, layout, scaled=True, zero_init=True)
    inputs, targets, _ = noisy_batch(graph, batch=2000, length=16, t_min=1e-3)
    with torch.no_grad():
        logits = network.head.logits(network.hidden(inputs[0][:3], inputs[1][:3]).flatten(0, 1))
        loss_B = network(inputs, targets, per_sequence=True)
    assert not logits.count_nonzero()
    masks_B = (inputs[0] == graph.mask_id).sum(1)
    expected_B = masks_B * targets.noise_B3[:, 2] * math.log(num_tokens)
    torch.testing.assert_close(loss_B.double(), expected_B, rtol=1e-6, atol=0.0)

    per_token_B = loss_B.double() / 16
    error = per_token_B.std() / math.sqrt(2000)
    assert error < 0.03 * math.log(num_tokens)
    assert abs(per_token_B.mean() - 0.999 * math.log(num_tokens)) < 4 * error


@pytest.mark.parametrize(
    ("residual", "weights", "tolerance"),
    [("bf16", torch.float32, 0.02), ("fp32", torch.bfloat16, 0.03), ("bf16", torch.bfloat16, 0.03)],
)
def test_half_precision_stays_near_full(
    layout: Layout, residual: str, weights: torch.dtype, tolerance: float
) -> None:
    graph = make_graph("uniform", 50)
    inputs, targets, _ = noisy_batch(graph)
    full = small_network(graph, layout, scaled=False)
    half = small_network(graph, layout, scaled=False, residual_dtype=residual).to(weights)
    loss, expected = half(inputs, targets), full(inputs, targets)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / expected.item() - 1) < tolerance
    loss.backward()
    expected.backward()
    found = gradients(half, layout)
    for name, gradient in gradients(full, layout).items():
        assert found[name].dtype == weights
        assert relative(found[name], gradient) < 0.1, name
