"""The score model without an engine: log-scores, losses and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_scale.config import config_from_dict
from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.errors import DataError
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import Layout, initialize_layout
from tests.diffusion.reference import log_score_score_entropy, noise_columns
from tests.tolerance import NETWORK

KINDS = [
    ("absorb", True, "loglinear"),
    ("absorb", False, "cosine"),
    ("uniform", False, "geometric"),
]
NUM_TOKENS, BATCH, LENGTH = 11, 3, 6


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def model(request: pytest.FixtureRequest, layout: Layout) -> ScoreModel:
    name, scaled, schedule = request.param
    sections: dict[str, Any] = {
        "model": {
            "hidden_size": 32, "num_layers": 1, "num_heads": 2, "cond_dim": 16,
            "zero_init": False, "scale_by_sigma": scaled,
        },
        "graph": {"name": name},
        "noise": {"name": schedule},
    }  # fmt: skip
    return ScoreModel(config_from_dict(sections), NUM_TOKENS, layout).eval()


def batch_of(model: ScoreModel) -> tuple[Tensor, Tensor, Tensor]:
    """Times, clean and noisy tokens."""
    generator = torch.Generator().manual_seed(0)
    t_B = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)
    x0_BL = torch.randint(NUM_TOKENS, (BATCH, LENGTH), generator=generator)
    move, token = torch.rand(2, BATCH, LENGTH, generator=generator, dtype=torch.float64)
    return t_B, x0_BL, model.graph.corrupt(x0_BL, model.schedule.sigma(t_B), move, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_scores_are_float32_with_own_entries_zero(
    model: ScoreModel, dtype: torch.dtype
) -> None:
    t_B, _, xt_BL = batch_of(model)
    log_score = model.to(dtype).log_score(xt_BL, model.schedule.sigma(t_B))
    assert log_score.shape == (BATCH, LENGTH, model.graph.num_states)
    assert log_score.dtype == torch.float32 and not log_score.requires_grad
    own = log_score.gather(-1, xt_BL[..., None])
    assert not own.any()
    assert log_score.count_nonzero() == log_score.numel() - own.numel()


def test_logits_are_the_log_scores_before_the_shift(model: ScoreModel) -> None:
    t_B, _, xt_BL = batch_of(model)
    sigma_B = model.schedule.sigma(t_B)
    rows_M = torch.tensor([0, 4, LENGTH, 2 * LENGTH + 5])
    logits = model.logits(xt_BL, sigma_B, rows_M)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    shift_B = torch.log(torch.expm1(sigma_B)) + math.log(NUM_TOKENS)
    shift_M = shift_B[rows_M // LENGTH] if model.config.resolved_scale_by_sigma else torch.zeros(4)
    expected = (logits - shift_M[:, None].float()).scatter(1, xt_BL.flatten()[rows_M, None], 0.0)
    found = model.log_score(xt_BL, sigma_B).flatten(0, 1)[rows_M]
    torch.testing.assert_close(found, expected, rtol=NETWORK, atol=NETWORK)


def test_losses_are_the_score_entropy_of_the_log_scores(model: ScoreModel) -> None:
    t_B, x0_BL, xt_BL = batch_of(model)
    loss_B = model.loss(x0_BL, t_B=t_B, xt_BL=xt_BL)
    noise = RowNoise(*noise_columns(model.schedule, t_B).unbind(1))
    log_score_BLV = model.log_score(xt_BL, noise.sigma)
    expected_BL = log_score_score_entropy(log_score_BLV, xt_BL, x0_BL, noise, graph=model.graph)
    torch.testing.assert_close(loss_B, expected_BL.sum(1), rtol=NETWORK, atol=0.0)


def test_a_small_step_down_the_gradient_lowers_the_loss_by_its_square(model: ScoreModel) -> None:
    t_B, x0_BL, xt_BL = batch_of(model)

    def loss() -> Tensor:
        return model.loss(x0_BL, t_B=t_B, xt_BL=xt_BL).mean()

    before = loss()
    before.backward()
    squares = sum(p.grad.double().square().sum() for p in model.parameters())
    step = 1e-3 * before.item() / squares.item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= step * parameter.grad
        drop = before.item() - loss().item()
    assert drop == pytest.approx(step * squares.item(), rel=0.05)


def test_what_is_not_given_is_drawn_from_the_generator(model: ScoreModel) -> None:
    _, x0_BL, _ = batch_of(model)

    def drawn(seed: int) -> Tensor:
        return model.loss(x0_BL, generator=torch.Generator().manual_seed(seed)).detach()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_noise_columns_are_sigma_its_rate_and_their_ratio(model: ScoreModel) -> None:
    t_B = torch.tensor([0.01, 0.4, 0.9], dtype=torch.float64)
    sigma_B, rate_B, weight_B = noise_columns(model.schedule, t_B).unbind(1)
    step = 1e-6
    slope_B = (model.schedule.sigma(t_B + step) - model.schedule.sigma(t_B - step)) / (2 * step)
    torch.testing.assert_close(sigma_B, model.schedule.sigma(t_B))
    torch.testing.assert_close(rate_B, slope_B, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(weight_B, rate_B / torch.expm1(sigma_B), rtol=1e-10, atol=0.0)


def test_tokens_that_do_not_fit_are_refused(model: ScoreModel) -> None:
    t_B, x0_BL, xt_BL = batch_of(model)
    sigma_B, states = model.schedule.sigma(t_B), model.graph.num_states
    for wrong in (-1, states):
        tokens = xt_BL.clone()
        tokens[1, 2] = wrong
        with pytest.raises(DataError, match=rf"do not fit this model's 0\.\.{states - 1};"):
            model.log_score(tokens, sigma_B)
        with pytest.raises(DataError, match=rf"do not fit this model's 0\.\.{states - 1};"):
            model.loss(x0_BL, t_B=t_B, xt_BL=tokens)
    clean = x0_BL.clone()
    clean[0, 0] = NUM_TOKENS  # the mask is no clean token
    with pytest.raises(DataError, match=rf"{NUM_TOKENS} do not fit this model's 0\.\.10;"):
        model.loss(clean, t_B=t_B, xt_BL=xt_BL)
    with pytest.raises(DataError, match=r"xt has shape \(3, 5\) and x0 \(3, 6\)"):
        model.loss(x0_BL, t_B=t_B, xt_BL=xt_BL[:, :-1])
