"""The whole network against the same transformer written in plain PyTorch."""

import math

import pytest
import torch
from torch import Tensor, nn

from sedd_scale.diffusion.graphs import Absorb, Graph, make_graph
from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.engine.stages import PipelineStage
from sedd_scale.model.attention import Context, documents_of, packed_context
from sedd_scale.model.network import ScoreNetwork
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import Layout, initialize_layout
from sedd_scale.parallel.vocab import ScoreTargets, score_targets
from tests.diffusion.reference import log_score_score_entropy, log_scores_from_logits
from tests.model.small_network import (
    fake_tensors,
    gradients,
    noisy_batch,
    relative,
    small_network,
)
from tests.plain_network import PlainNetwork
from tests.published import to_published
from tests.tolerance import GRADIENT, NETWORK, ROUNDING

HIDDEN, HEADS, COND, BLOCKS = 32, 4, 24, 2
KINDS = [("absorb", True), ("absorb", False), ("uniform", False)]


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


def plain_copy(network: ScoreNetwork, graph: Graph, layout: Layout) -> PlainNetwork:
    weights = {p.name: p.parameter.detach() for p in logical_parameters(network, layout)}
    plain = PlainNetwork(
        num_states=graph.num_states, width=HIDDEN, layers=BLOCKS, heads=HEADS, cond_dim=COND
    )
    plain.load_state_dict(to_published(weights, num_layers=BLOCKS, num_heads=HEADS))
    return plain


def plain_losses(
    plain: PlainNetwork,
    graph: Graph,
    scaled: bool,
    noisy_BL: Tensor,
    clean_BL: Tensor,
    noise_B3: Tensor,
) -> Tensor:
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
    assert relative(logits_LBV.transpose(0, 1), expected_BLV) < NETWORK

    expected_BL = plain_losses(plain, graph, scaled, noisy_BL, clean_BL, targets.noise_B3)
    loss = network(inputs, targets)
    torch.testing.assert_close(loss, expected_BL.mean().to(loss.dtype), rtol=NETWORK, atol=0.0)
    loss_B = network(inputs, targets, per_sequence=True)
    torch.testing.assert_close(loss_B, expected_BL.sum(1).to(loss.dtype), rtol=NETWORK, atol=0.0)

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
            assert relative(found[key], parameter.grad) < GRADIENT, key


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
    # Positive terms: 16 additions, and a few operations that make a term, a rounding each at most.
    rounded = (16 + 8) * ROUNDING
    torch.testing.assert_close(loss_B.double(), expected_B, rtol=rounded, atol=0.0)

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


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_packed_documents_are_as_if_alone(layout: Layout, name: str, scaled: bool) -> None:
    """Given the ends of documents a packed block's loss is the sum of its documents' own losses.

    Rotary positions are relative, so a document's place in the block does not matter.
    """
    graph = make_graph(name, 50)
    network = small_network(graph, layout, scaled=scaled)
    (noisy_BL, sigma_B, keys_B), targets, clean_BL = noisy_batch(graph, batch=2, length=12)
    ends_BE = torch.tensor([[5, 12], [5, 12]])

    def nats(part: slice, documents: Tensor | None) -> Tensor:
        part_targets = score_targets(
            graph,
            clean_BL=clean_BL[:, part],
            noisy_BL=noisy_BL[:, part],
            noise_B3=targets.noise_B3,
        )
        inputs = (noisy_BL[:, part], sigma_B, packed_context(keys_B, documents))
        return network(inputs, part_targets, per_sequence=True)

    packed_B = nats(slice(0, 12), ends_BE)
    torch.testing.assert_close(packed_B, nats(slice(0, 5), None) + nats(slice(5, 12), None))
    assert not torch.allclose(packed_B, nats(slice(0, 12), None), rtol=1e-4)


def test_each_segment_has_its_own_noise(layout: Layout) -> None:
    """Two documents in a block, each at its sigma, are as each alone, gradients too."""
    graph = make_graph("absorb", 50)
    network = small_network(graph, layout, scaled=True)
    (noisy_BL, sigma_B, _), *_ = noisy_batch(graph, batch=3, length=12)
    sigma_SB = torch.stack([sigma_B, sigma_B.flip(0)])
    ends_BE = torch.tensor([[6, 12]] * 3)
    weights_LBH = torch.randn(12, 3, 32, generator=torch.Generator().manual_seed(1))
    found: list[dict[str, Tensor]] = []
    outputs = []
    for together in (True, False):
        network.zero_grad()
        if together:
            output_LBH = network.hidden(noisy_BL, sigma_SB, ends_BE)
        else:
            parts = zip(noisy_BL.split(6, dim=1), sigma_SB)
            output_LBH = torch.cat([network.hidden(part, sigma) for part, sigma in parts])
        (output_LBH * weights_LBH).sum().backward()
        found.append(
            {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        )
        outputs.append(output_LBH.detach())
    torch.testing.assert_close(*outputs)
    for name, gradient in found[0].items():
        assert relative(gradient, found[1][name]) < GRADIENT, name
    rows_M = torch.tensor([0, 5, 6, 14, 23, 24, 35])  # of the flattened [B * L]
    some_MH = network.eval().hidden_of_rows(noisy_BL, sigma_SB, rows_M, ends_BE)
    torch.testing.assert_close(some_MH, outputs[0].transpose(0, 1).flatten(0, 1)[rows_M])


@pytest.mark.parametrize("segments", [0, 2, 3])
def test_what_travels_between_stages_comes_back(layout: Layout, segments: int) -> None:
    """Hidden states, and the conditions of sequences or of their segments."""
    stage = Stage(layout, cond_dim=24)
    shape = (segments, 2) if segments else (2,)
    stage.padded([(torch.zeros(2, 6), torch.zeros(shape), torch.zeros(2, 1))])
    hidden_LBH, cond = torch.randn(6, 2, 32), torch.randn(*shape, 24)
    packed, _ = stage._pack(hidden_LBH, cond, torch.zeros(2, 1))
    same_LBH, same, _ = stage._unpack(packed, torch.zeros(2, 1))
    assert torch.equal(same_LBH, hidden_LBH) and torch.equal(same, cond)


@pytest.mark.parametrize("hidden", [None, 2**31])
@pytest.mark.parametrize("length", [6, 7])
def test_contexts_of_any_documents_travel_in_one_shape(
    layout: Layout, length: int, hidden: int | None
) -> None:
    """And are read, behind a stage, as they were made, with and without what is hidden."""
    stage = Stage(layout, cond_dim=24)
    stage.wide = True
    every = torch.arange(1, length + 1).expand(2, -1)
    few = torch.tensor([[2, length], [length, length]])
    for ends in ([every, few], [few, few], [None, None]):
        packed = [packed_context(torch.tensor([4, 5]), part, hidden=hidden) for part in ends]
        batches = [(torch.zeros(2, length), torch.zeros(2), context_BK) for context_BK in packed]
        contexts = [context_BK for _, _, context_BK in stage.padded(batches)]
        assert {context_BK.shape for context_BK in contexts} == {(2, length + 3)}
        for context_BK, part in zip(contexts, ends, strict=True):
            made = Context.unpacked(context_BK[:, : stage.context_width], causal=False)
            assert made.keys_B.tolist() == [4, 5]
            assert getattr(made.pattern, "hidden_B", torch.empty(0)).tolist() == [hidden] * 2 * (
                hidden is not None
            )
            if part is not None:
                found = documents_of(made.pattern.ends_BE, length)
                assert torch.equal(found, documents_of(part, length))


class Stage(PipelineStage):
    """One that no engine runs."""

    def __init__(self, layout: Layout, cond_dim: int) -> None:
        nn.Module.__init__(self)
        self.layout, self.cond_dim, self.causal, self.wide = layout, cond_dim, False, False
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("recompute_every", [0, 1])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_a_step_waits_for_no_number_of_the_device(
    layout: Layout, name: str, scaled: bool, recompute_every: int
) -> None:
    """Forward and backward run on tensors that have shapes and no values."""
    graph = make_graph(name, 50)
    network = small_network(
        graph, layout, scaled=scaled, recompute_every=recompute_every, dropout=0.1
    )
    (noisy_BL, sigma_B, keys_B), targets, _ = noisy_batch(graph, batch=2, length=12)
    ends_BE, hidden = torch.tensor([[5, 12], [3, 12]]), 2**31 if recompute_every else None
    inputs = (noisy_BL, sigma_B, packed_context(keys_B, ends_BE, hidden=hidden))
    with fake_tensors() as mode:
        loss = network(
            tuple(mode.from_tensor(tensor) for tensor in inputs),
            ScoreTargets(*(mode.from_tensor(tensor) for tensor in targets)),
        )
        loss.backward()


@pytest.mark.parametrize("rotary_base", [0.0, 10_000.0])
def test_only_rotation_tells_positions_apart(layout: Layout, rotary_base: float) -> None:
    """Without it permuted tokens give permuted outputs."""
    network = small_network(make_graph("absorb", 50), layout, scaled=True, rotary_base=rotary_base)
    (noisy_BL, sigma_B, _), _, _ = noisy_batch(make_graph("absorb", 50), batch=2, length=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole_LBH = network.hidden(noisy_BL, sigma_B)
        permuted_LBH = network.hidden(noisy_BL[:, order], sigma_B)
    assert (relative(permuted_LBH, whole_LBH[order]) < NETWORK) == (rotary_base == 0)
