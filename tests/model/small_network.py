"""Small score networks and noisy batches, the same in every process that asks for them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sedd_scale.config import Config, ModelConfig
from sedd_scale.config.sections import GraphConfig, ParallelConfig, TrainingConfig
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.schedules import make_schedule
from sedd_scale.model import dropout
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.rotary import rotary_table
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import ScoreTargets, score_targets
from tests.diffusion.reference import noise_columns

Inputs = tuple[Tensor, Tensor, Tensor]


def small_config(
    graph: Graph,
    *,
    scaled: bool,
    seed: int = 3,
    recompute_every: int = 0,
    recompute_mode: str = "full",
    **changes: Any,
) -> Config:
    """Two blocks of width 32 with a head that is not zero, no dropout unless asked.

    Args:
        changes: of the section `model`.
    """
    sizes: dict[str, Any] = dict(
        hidden_size=32, num_layers=2, num_heads=4, cond_dim=24, dropout=0.0, zero_init=False
    )
    return Config(
        model=ModelConfig(**{**sizes, "scale_by_sigma": scaled, **changes}),
        graph=GraphConfig(name=graph.name),
        parallel=ParallelConfig(recompute_every=recompute_every, recompute_mode=recompute_mode),
        training=TrainingConfig(seed=seed),
    )


def small_network(graph: Graph, layout: Layout, *, scaled: bool, **changes: Any) -> ScoreNetwork:
    """A network with random weights of a `small_config`; norm weights too are moved off one."""
    builders = layer_builders(small_config(graph, scaled=scaled, **changes), graph, layout)
    network = ScoreNetwork(builders)
    with torch.no_grad():
        for logical in logical_parameters(network, layout):
            if ".norm" in logical.name:
                logical.parameter.add_(torch.linspace(-0.5, 0.5, len(logical.parameter)))
    return network


def noisy_batch(
    graph: Graph, *, batch: int = 3, length: int = 8, seed: int = 5, t_min: float = 0.05
) -> tuple[Inputs, ScoreTargets, Tensor]:
    """(noisy, sigma, keys), the loss's targets and the clean tokens of a log-linear noisy batch."""
    generator = torch.Generator().manual_seed(seed)
    clean_BL = torch.randint(graph.num_tokens, (batch, length), generator=generator)
    t_B = t_min + (1 - t_min) * torch.rand(batch, generator=generator, dtype=torch.float64)
    noise_B3 = noise_columns(make_schedule("loglinear"), t_B)
    move_BL, token_BL = torch.rand(2, batch, length, generator=generator, dtype=torch.float64)
    noisy_BL = graph.corrupt(clean_BL, noise_B3[:, 0], move_BL, token_BL)
    targets = score_targets(graph, clean_BL=clean_BL, noisy_BL=noisy_BL, noise_B3=noise_B3)
    keys_B = torch.randint(2**62, (batch,), generator=generator)
    return (noisy_BL, noise_B3[:, 0].float(), keys_B), targets, clean_BL


def gradients(network: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """This process's gradients under their logical names; every parameter must have one."""
    found = {}
    for logical in logical_parameters(network, layout):
        assert logical.parameter.grad is not None, logical.name
        found[logical.name] = logical.parameter.grad
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@contextlib.contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """A fake mode that leaves none of its tensors in the model's caches."""
    caches = (rotary_table, dropout._site_key, dropout._positions, dropout._channel_hashes)

    def forget() -> None:
        for cached in caches:
            cached.cache_clear()

    forget()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        forget()
