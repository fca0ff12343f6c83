"""Blocks: identity at the start, residual type, dropout and recomputation."""

import pytest
import torch
from torch import Tensor

from sedd_scale.diffusion.graphs import Absorb
from sedd_scale.model.attention import Context, WholeSequence
from sedd_scale.model.block import Block, Stream
from sedd_scale.model.dropout import keep_mask
from sedd_scale.parallel.layout import Layout, initialize_layout
from tests.model.small_network import gradients, noisy_batch, small_network

GRAPH = Absorb(50)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


def stream(dtype: torch.dtype = torch.float32) -> Stream:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 3, 32, generator=generator).to(dtype)
    context = Context(torch.arange(3), WholeSequence())
    return hidden, torch.randn(3, 24, generator=generator), context


def blocks_of(layout: Layout, **changes: object) -> list[Block]:
    network = small_network(GRAPH, layout, scaled=True, **changes)
    return [layer for layer in network.layers if isinstance(layer, Block)]


def test_a_block_starts_as_the_identity(layout: Layout) -> None:
    block, _ = blocks_of(layout, zero_init=True)
    inputs = stream()
    outputs = block(inputs)
    for before, after in zip(inputs[:2], outputs[:2]):
        assert torch.equal(before, after)
    moved, _, _ = blocks_of(layout)[0](inputs)
    assert (moved - inputs[0]).abs().max() > 0.1


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_the_residual_stream_keeps_its_type(
    layout: Layout, residual: torch.dtype, weights: torch.dtype
) -> None:
    hidden, cond, context = stream(residual)
    for block in blocks_of(layout):
        hidden, cond, context = block.to(weights)((hidden, cond.to(weights), context))
        assert hidden.dtype == residual and cond.dtype == weights
        assert context.keys_B.dtype == torch.int64


def test_the_embedding_starts_the_stream_in_the_configured_type(layout: Layout) -> None:
    inputs, _, _ = noisy_batch(GRAPH)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        network = small_network(GRAPH, layout, scaled=True, residual_dtype=name)
        assert network.layers[0](inputs)[0].dtype == dtype


def test_dropout_is_for_training_only_and_differs_by_site(layout: Layout) -> None:
    first, second = blocks_of(layout, dropout=0.5)
    never, _ = blocks_of(layout)
    inputs = stream()
    assert torch.equal(first.eval()(inputs)[0], never(inputs)[0])
    for block in (first, second):
        block.train()
    assert torch.equal(first(inputs)[0], first(inputs)[0])
    assert not torch.equal(first(inputs)[0], never(inputs)[0])
    masks = [
        keep_mask(*block._dropout(inputs[0], inputs[2].keys_B, site=2 * block.index + branch))
        for block in (first, second)
        for branch in (0, 1)
    ]
    for i, one in enumerate(masks):
        assert all(not torch.equal(one, other) for other in masks[:i])


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("recompute_every", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputation_changes_nothing(
    layout: Layout, dropout: float, recompute_every: int, mode: str
) -> None:
    """Not the loss nor any gradient, to the last bit; dropout's masks come back the same."""
    inputs, targets, _ = noisy_batch(GRAPH)
    results = []
    for every in (0, recompute_every):
        network = small_network(
            GRAPH,
            layout,
            scaled=True,
            dropout=dropout,
            recompute_every=every,
            recompute_mode=mode,
        )
        torch.manual_seed(every)
        loss = network(inputs, targets)
        torch.manual_seed(100 + every)
        loss.backward()
        results.append((loss, gradients(network, layout)))
    (loss, kept), (same_loss, recomputed) = results
    assert torch.equal(loss, same_loss)
    for name, gradient in kept.items():
        assert gradient.norm() > 0, name
        assert torch.equal(gradient, recomputed[name]), name


@pytest.mark.parametrize(("every", "recomputed"), [(0, []), (1, [0, 1, 2]), (2, [0, 2])])
def test_every_kth_block_keeps_no_activations(
    layout: Layout, every: int, recomputed: list[int]
) -> None:
    """Only what a block was given is saved for the backward pass of one that is recomputed."""
    inputs, _, _ = noisy_batch(GRAPH)
    network = small_network(GRAPH, layout, scaled=True, recompute_every=every, num_layers=3)
    current = network.layers[0](inputs)
    light = []
    for block in network.layers[1:-1]:
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            current = block(current)
        if sum(saved) <= sum(part.numel() for part in (*current[:2], current[2].keys_B)):
            light.append(block.index)
    assert light == recomputed
