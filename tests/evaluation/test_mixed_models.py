"""A wrapper around two networks: every sampler and the bound are those of their mixed tables."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.model.logit_model import LogitModel
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling import samplers_of
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from tests.diffusion.reference import log_score_score_entropy, noise_columns
from tests.evaluation.enumeration import (
    all_states,
    exact_diffusion_nats,
    exact_reconstruction_nats,
    tiny_model,
)
from tests.sampling.test_left_to_right import without_cache

WEIGHT, LENGTH, TOKENS = 1.5, 2, 3


class Mixed(LogitModel):
    """w z_c + (1 - w) z_0 of two networks, their rows side by side."""

    def __init__(self, conditional: ScoreModel, plain: ScoreModel) -> None:
        self.networks = (conditional, plain)
        for name in ("graph", "schedule", "law", "objective", "config", "layout"):
            setattr(self, name, getattr(conditional, name))

    device = torch.device("cpu")

    @property
    def time_conditioned(self) -> bool:
        return any(network.time_conditioned for network in self.networks)

    @property
    def causal(self) -> bool:
        return self.networks[0].causal

    def rows(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        both = [network.rows(tokens_BL, sigma_B, rows_M, ends_BE) for network in self.networks]
        return torch.cat(both, dim=1)

    def logits_of(self, rows_MW: Tensor) -> Tensor:
        given, plain = (
            network.logits_of(part) for network, part in zip(self.networks, rows_MW.chunk(2, dim=1))
        )
        return WEIGHT * given + (1 - WEIGHT) * plain

    @contextlib.contextmanager
    def caching(self, capacity: int) -> Iterator[None]:
        with self.networks[0].caching(capacity), self.networks[1].caching(capacity):
            yield


class Tables(Mixed):
    """The same from whole tables [B, L, V] of log-scores: no rows, no head of rows, no chunks."""

    def log_score(self, tokens_BL: Tensor, sigma_B: Tensor) -> Tensor:
        given, plain = (network.log_score(tokens_BL, sigma_B) for network in self.networks)
        return WEIGHT * given + (1 - WEIGHT) * plain

    def rows(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        return self.log_score(tokens_BL, sigma_B).flatten(0, 1)[rows_M]

    def logits_of(self, rows_MW: Tensor) -> Tensor:
        return rows_MW

    def loss(self, x0_BL: Tensor, t_B: Tensor, xt_BL: Tensor) -> Tensor:
        """Score entropy by its definition, [B]."""
        noise = RowNoise(*noise_columns(self.schedule, t_B).unbind(1))
        log_score_BLV = self.log_score(xt_BL, noise.sigma)
        nats_BL = log_score_score_entropy(log_score_BLV, xt_BL, x0_BL, noise, graph=self.graph)
        return nats_BL.sum(dim=1)


def pair(graph: str, **options: object) -> tuple[ScoreModel, ScoreModel]:
    """Two networks of other weights whose logits are log-scores."""
    changes = {} if graph == "mean" else {"scale_by_sigma": False}
    one, two = (
        tiny_model(graph, "loglinear", seed=seed, changes=changes, **options)  # type: ignore[arg-type]
        for seed in (0, 1)
    )
    return one, two


@pytest.mark.parametrize(
    "graph, sampler",
    [(graph, name) for graph in ("absorb", "uniform") for name in samplers_of(graph)],
)
def test_every_sampler_draws_what_the_tables_give(graph: str, sampler: str) -> None:
    networks = pair(graph, num_tokens=7, block_length=6)
    given_BL = torch.arange(24).view(4, 6) % 7
    fixed_BL = torch.rand(given_BL.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    settings = SamplerSettings(sampler, steps=3)
    drawn = [draw(kind(*networks), given_BL, fixed_BL, settings) for kind in (Mixed, Tables)]
    alone = draw(networks[0], given_BL, fixed_BL, settings)
    assert torch.equal(*drawn) and not torch.equal(drawn[0], alone)


def test_left_to_right_has_a_cache_of_each() -> None:
    mixed = Mixed(*pair("absorb", objective="autoregressive", num_tokens=6, block_length=9))
    given_BL = torch.arange(27).view(3, 9) % 6
    fixed_BL = torch.arange(9) < torch.tensor([[0], [2], [5]])
    settings = SamplerSettings("left-to-right")
    whole_BL = without_cache(mixed, given_BL, fixed_BL, settings)
    assert torch.equal(draw(mixed, given_BL, fixed_BL, settings, seed=4), whole_BL)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_the_bound_is_the_exact_one_of_the_tables(graph: str) -> None:
    networks = pair(graph)
    mixed, tables = Mixed(*networks), Tables(*networks)
    blocks_nL = all_states(TOKENS, LENGTH)
    last = mixed.schedule.sigma(torch.ones((), dtype=torch.float64))
    exact_n = [
        exact_diffusion_nats(tables, block, 1e-2)  # type: ignore[arg-type]
        + exact_reconstruction_nats(tables, block, 1e-2)  # type: ignore[arg-type]
        for block in blocks_nL
    ]
    exact = np.mean(exact_n) / LENGTH + float(mixed.graph.prior_kl_per_token(last))
    found = evaluate_bound(mixed, blocks_nL, draws=64, t_min=1e-2, batch_size=64, seed=3)
    assert 0 < found.stderr < 0.1 * found.nats_per_token
    assert abs(found.nats_per_token - exact) < 3 * found.stderr


@pytest.mark.parametrize("graph", ["absorb", "uniform", "mean"])
def test_losses_from_logits_are_those_made_in_the_head(graph: str) -> None:
    model, _ = pair(graph, block_length=4)
    plain = Mixed(model, model)  # w z + (1 - w) z is z
    clean_BL = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    noisy_BL = torch.tensor([[2, 1, 0, 1], [2, 1, 0, 1]])
    if plain.graph.mask_id is not None:
        noisy_BL = noisy_BL.masked_fill(noisy_BL != clean_BL, plain.graph.mask_id)
    noise_B3 = noise_columns(plain.schedule, torch.tensor([0.3, 0.8]))
    counted_BL = torch.arange(4) < torch.tensor([[4], [3]])
    laws = [law for law in (model.law, model.law.when_normalised()) if law is not None]
    arguments = (clean_BL, noisy_BL, noise_B3, counted_BL)
    torch.testing.assert_close(
        plain.losses(*arguments, laws=laws), model.losses(*arguments, laws=laws)
    )
