"""The textbook side of the benchmarks trains the same model: else its time would mean nothing."""

import argparse

import pytest
import torch

from sedd_scale.benchmark.synthetic import LEARNING_RATE, SyntheticRun, synthetic_config
from sedd_scale.benchmark.textbook import TextbookTrainer
from sedd_scale.parallel.layout import Layout, initialize_layout
from tests.published import to_published
from tests.tolerance import GRADIENT, NETWORK


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


def arguments(*overrides: str) -> argparse.Namespace:
    return argparse.Namespace(
        model="tiny",
        batch_size=2,
        accumulate=1,
        block_length=16,
        vocab_size=60,
        overrides=["model.hidden_size=32", "model.num_layers=2", "model.dropout=0", *overrides],
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ("graph.name=absorb",),
        ("graph.name=absorb", "model.scale_by_sigma=false"),
        ("graph.name=uniform",),
    ],
)
def test_both_sides_take_the_same_steps(layout: Layout, overrides: tuple[str, ...]) -> None:
    config = synthetic_config(
        arguments(*overrides, "optimizer.clip=0.5"), "training.precision=fp32", world_size=1
    )
    synthetic = SyntheticRun(config, layout)
    engine = synthetic.engine()
    textbook = TextbookTrainer(config, synthetic.graph, layout.device)
    weights = {logical.name: logical.parameter.detach() for logical in engine.parameters}
    published = to_published(
        weights, num_layers=config.model.num_layers, num_heads=config.model.num_heads
    )
    textbook.network.load_state_dict(published)
    for average, weight in zip(textbook.averages, textbook.network.parameters()):
        average.copy_(weight.detach())

    for step in range(4):
        ours = synthetic.train_step(engine, step)
        loss, norm = textbook.step(synthetic.noisy_batch(step), lr=LEARNING_RATE)
        assert ours.loss == pytest.approx(loss, rel=NETWORK)
        assert ours.grad_norm == pytest.approx(norm, rel=GRADIENT)
        assert norm > 0.5, "clipping must be active for the comparison to mean something"
    weights = {logical.name: logical.parameter.detach() for logical in engine.parameters}
    published = to_published(
        weights, num_layers=config.model.num_layers, num_heads=config.model.num_heads
    )
    for name, weight in textbook.network.named_parameters():
        # Adam's steps are of one size, whatever the gradient's: 2e-5 is a fifth of one.
        torch.testing.assert_close(published[name], weight.detach(), rtol=1e-4, atol=2e-5)
    averages = {
        logical.name: engine.fragments.get(logical, "ema").flat.view(logical.shape)  # type: ignore[union-attr]
        for logical in engine.parameters
    }
    published = to_published(
        averages, num_layers=config.model.num_layers, num_heads=config.model.num_heads
    )
    for (name, _), average in zip(textbook.network.named_parameters(), textbook.averages):
        torch.testing.assert_close(published[name], average, rtol=1e-4, atol=2e-5)
