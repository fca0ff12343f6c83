"""What each objective asks of a row, against its definition on whole laws in float64."""

import math

import pytest
import torch

from sedd_scale.config import Config
from sedd_scale.diffusion.corruption import Draw
from sedd_scale.diffusion.graphs import Absorb, make_graph
from sedd_scale.diffusion.objectives import (
    Autoregressive,
    D3PMAbsorb,
    MaskedCrossEntropy,
    ScoreEntropy,
    make_objective,
)
from sedd_scale.diffusion.row_law import row_law
from sedd_scale.diffusion.schedules import make_schedule
from sedd_scale.diffusion.score_entropy import RowNoise, cross_entropy_rows
from tests.diffusion.reference import log_score_score_entropy, row_loss, row_statistics

SCHEDULES = ("loglinear", "geometric", "cosine", "linear")
NUM_TOKENS = 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_names_make_objectives() -> None:
    for kind in (ScoreEntropy, MaskedCrossEntropy, Autoregressive):
        made = make_objective(Config().override(f"training.objective={kind.name}"))
        assert type(made) is kind
    config = Config().override("training.objective=d3pm_absorb", "training.d3pm_steps=7")
    assert make_objective(config) == D3PMAbsorb(7, 0.01)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_cross_entropy_is_score_entropy_of_normalised_scores(noise: str) -> None:
    """Loss and gradient, the latter up to the constant direction that normalisation takes out."""
    schedule, graph = make_schedule(noise), Absorb(NUM_TOKENS)
    t_M = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    columns_M3 = MaskedCrossEntropy().noise_columns(schedule, t_M, training=True)
    target_M = torch.tensor([0, 1, 2, 3, 4, 0])
    logits_MN = normal(6, NUM_TOKENS)
    normalised_MN = logits_MN - logits_MN.logsumexp(1, keepdim=True) + math.log(NUM_TOKENS)
    found = cross_entropy_rows(row_statistics(logits_MN, target_M), columns_M3[:, 2])
    expected = row_loss(
        row_statistics(normalised_MN, target_M),
        RowNoise(*columns_M3.unbind(1)),
        graph=graph,
        scaled=True,
    )
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0.0)
    # Any other scores cost more, at the same target and the same softmax.
    other = row_loss(
        row_statistics(logits_MN, target_M),
        RowNoise(*columns_M3.unbind(1)),
        graph=graph,
        scaled=True,
    )
    assert (other.loss > found.loss).all()


@pytest.mark.parametrize("noise", SCHEDULES)
def test_the_mean_parametrisation_of_masks_is_score_entropy_by_its_definition(noise: str) -> None:
    """Of scores q_y / (e^sigma - 1), with its gradient by autograd through their softmax."""
    schedule, graph = make_schedule(noise), Absorb(NUM_TOKENS)
    t_M = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    noise_M = RowNoise(*ScoreEntropy().noise_columns(schedule, t_M, training=False).unbind(1))
    clean_M, masked_M = torch.tensor([0, 1, 2, 3, 4, 0]), torch.full((6,), NUM_TOKENS)
    logits_MN = normal(6, NUM_TOKENS).requires_grad_()
    log_score_MN = logits_MN.log_softmax(1) - noise_M.sigma.expm1().log()[:, None]
    log_score_MV = torch.cat([log_score_MN, log_score_MN.new_zeros(6, 1)], dim=1)
    expected_M = log_score_score_entropy(log_score_MV, masked_M, clean_M, noise_M, graph=graph)
    expected_M.sum().backward()

    law = row_law(graph, mean=True)
    statistics = row_statistics(logits_MN.detach(), clean_M)
    rows = law.rows(statistics, noise_M)
    torch.testing.assert_close(rows.loss, expected_M.detach(), rtol=1e-11, atol=1e-12)
    table_MN = rows.grad_exp[:, None] * (logits_MN.detach() - statistics.max[:, None]).exp()
    table_MN[torch.arange(6), clean_M] += rows.grad_target
    torch.testing.assert_close(table_MN, logits_MN.grad, rtol=1e-9, atol=1e-12)
    known_MN = law.with_known_constant(logits_MN.detach().clone())
    found_MV = law.log_scores(
        torch.cat([known_MN, known_MN.new_zeros(6, 1)], dim=1), masked_M, noise_M.sigma
    )
    torch.testing.assert_close(found_MV, log_score_MV.detach(), rtol=1e-11, atol=1e-12)
    assert law.when_normalised() is None


def test_cross_entropy_rows_carry_their_gradient() -> None:
    weight_M = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64)
    target_M = torch.tensor([4, 0, 2])
    logits_MN = normal(3, NUM_TOKENS).requires_grad_()
    nats_M = torch.nn.functional.cross_entropy(logits_MN, target_M, reduction="none")
    (weight_M * nats_M).sum().backward()
    statistics = row_statistics(logits_MN.detach(), target_M)
    rows = cross_entropy_rows(statistics, weight_M)
    torch.testing.assert_close(rows.loss, (weight_M * nats_M).detach())
    table_MN = rows.grad_exp[:, None] * (logits_MN.detach() - statistics.max[:, None]).exp()
    table_MN += rows.grad_rest[:, None]
    table_MN[torch.arange(3), target_M] += rows.grad_target
    torch.testing.assert_close(table_MN, logits_MN.grad)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_a_chain_s_weight_is_its_step_s_divergence(noise: str) -> None:
    """KL of q(x_s | x_t = mask, x_0 = 2) against the model's step, by Bayes' rule, in float64."""
    objective, graph = D3PMAbsorb(steps=6), Absorb(NUM_TOKENS)
    schedule = make_schedule(noise, sigma_max=3.0)
    softmax_N = normal(NUM_TOKENS).softmax(0)
    nats = -torch.log(softmax_N[2])
    t_K = torch.arange(1, 7, dtype=torch.float64) / 6
    weight_K = objective.noise_columns(schedule, t_K, training=False)[:, 2] / 6
    assert weight_K[0] == pytest.approx(1.0)
    every = torch.arange(NUM_TOKENS)
    for number in range(2, 7):
        now, before = (
            schedule.sigma(torch.tensor([k / 6], dtype=torch.float64)) for k in (number, number - 1)
        )
        states = torch.arange(graph.num_states)
        onwards_V = graph.transition_probabilities(states, (now - before).expand(len(states)))
        to_mask_V = onwards_V[:, graph.mask_id]

        joint_NV = graph.transition_probabilities(every, before.expand(NUM_TOKENS)) * to_mask_V
        posterior_NV = joint_NV / joint_NV.sum(1, keepdim=True)
        q_V, p_V = posterior_NV[2], softmax_N @ posterior_NV
        kl = torch.special.xlogy(q_V, q_V / p_V.clamp_min(1e-300)).sum()
        torch.testing.assert_close(kl, weight_K[number - 1] * nats, rtol=1e-9, atol=1e-12)


def test_training_of_a_chain_mixes_its_bound_with_plain_cross_entropy() -> None:
    schedule, t_K = make_schedule("loglinear"), torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    objective = D3PMAbsorb(steps=100, ce_weight=0.01)
    bound, mixed = (
        objective.noise_columns(schedule, t_K, training=kind)[:, 2] for kind in (False, True)
    )
    torch.testing.assert_close(bound, 1.0 / t_K)
    torch.testing.assert_close(mixed, (bound + 1.0) / 2.0)
    times = objective.on_grid(torch.tensor([0.0, 0.0099, 0.01, 0.994, 0.9999], dtype=torch.float64))
    assert times.tolist() == [0.01, 0.01, 0.01, 1.0, 1.0]
    grid = torch.arange(1, 101, dtype=torch.float64) / 100
    assert torch.equal(objective.on_grid(grid), grid)
    inner = objective.inner_times((torch.arange(990) + 0.5) / 990)
    assert sorted({round(float(t) * 100) for t in inner}) == list(range(2, 101))
    assert torch.bincount((inner * 100).round().long()).tolist()[2:] == [10] * 99


def test_an_autoregressive_batch_shows_each_position_the_token_before() -> None:
    graph = make_graph("absorb", NUM_TOKENS)
    clean_BL = torch.tensor([[3, 1, 4, 1], [0, 2, 2, 0]])
    draw = Draw(0, 2, [4, 9], global_batch=16)
    process = {"graph": graph, "schedule": make_schedule("loglinear"), "t_min": 1e-3}
    shown = Autoregressive().corrupt(clean_BL, draw, **process)
    assert shown.noisy_BL.tolist() == [[5, 3, 1, 4], [5, 0, 2, 2]]
    assert shown.clean_BL.tolist() == clean_BL.tolist()
    assert shown.noise_B3.tolist() == [[0.0, 0.0, 1.0]] * 2
    # What is keyed by sample and step alone is that of every objective.
    other = ScoreEntropy().corrupt(clean_BL, draw, **process)
    assert shown.dropout_key_B.tolist() == other.dropout_key_B.tolist()


@pytest.mark.parametrize("noise", SCHEDULES)
@pytest.mark.parametrize("objective", ["score_entropy", "masked_cross_entropy"])
def test_softened_weights_are_of_training_alone(objective: str, noise: str) -> None:
    schedule = make_schedule(noise)
    t_B = torch.linspace(0.01, 1.0, 7, dtype=torch.float64)
    plain, soft = (
        make_objective(
            Config().override(
                f"training.objective={objective}", f"training.weight_softening={softening}"
            )
        )
        for softening in (0, 0.3)
    )
    bound_B3 = plain.noise_columns(schedule, t_B, training=True)
    assert torch.equal(soft.noise_columns(schedule, t_B, training=False), bound_B3)
    found_B3 = soft.noise_columns(schedule, t_B, training=True)
    move_B = schedule.move_probability(t_B)
    torch.testing.assert_close(found_B3[:, 0], bound_B3[:, 0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(found_B3[:, 1:] * (1 + 0.3 / move_B)[:, None], bound_B3[:, 1:])
