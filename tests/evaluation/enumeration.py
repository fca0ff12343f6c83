"""Exact answers for networks small enough to visit every state: the oracle of the bound."""

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sedd_scale.config import config_from_dict
from sedd_scale.evaluation.importance import weighted_times
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from tests.diffusion.reference import incoming_rates

BATCH = 4096


def tiny_model(
    graph: str,
    noise: str,
    *,
    num_tokens: int = 3,
    block_length: int = 2,
    seed: int = 0,
    tensor: int = 1,
    changes: Mapping[str, object] | None = None,
    time_conditioning: bool = True,
    objective: str = "score_entropy",
    **training: object,
) -> ScoreModel:
    """A random network over a handful of tokens, in eval mode, with far from equal scores.

    Args:
        graph: or "mean" and "absorb mean", uniform and absorb under the mean parametrisation.
        changes: of the model's section.
    """
    if graph in ("mean", "absorb mean"):
        graph = "uniform" if graph == "mean" else "absorb"
        changes = {"parametrisation": "mean", **(changes or {})}
    config = config_from_dict(
        {
            "model": {
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "cond_dim": 8,
                "zero_init": False,
                "time_conditioning": time_conditioning,
                "vocab_size": num_tokens,
                **(changes or {}),
            },
            "graph": {"name": graph},
            "noise": {"name": noise, "sigma_max": 8.0},
            "training": {"seed": seed, "objective": objective, **training},
        }
    )
    layout = initialize_layout(tensor=tensor)
    return ScoreModel(config, num_tokens, layout, block_length=block_length).eval()


def all_states(num_states: int, length: int) -> Tensor:
    """Every sequence, [num_states^length, length]."""
    return torch.tensor(list(itertools.product(range(num_states), repeat=length)))


@torch.no_grad()
def exact_diffusion_nats(
    model: ScoreModel, clean_L: Tensor, t_min: float, *, nodes: int = 64
) -> float:
    """Integral over t of the expected loss of one sequence, every x_t visited."""
    place_Q, weights = np.polynomial.legendre.leggauss(nodes)
    t_Q = torch.from_numpy(t_min + (1 - t_min) * (place_Q + 1) / 2)
    weight_Q = torch.from_numpy(weights * (1 - t_min) / 2)
    states_SL = all_states(model.graph.num_states, len(clean_L))
    law_QLV = model.graph.transition_probabilities(
        clean_L.expand(len(t_Q), -1), model.schedule.sigma(t_Q)
    )
    index_QLS = states_SL.t().expand(len(t_Q), -1, -1)
    probability_QS = law_QLV.gather(2, index_QLS).prod(dim=1)
    reached = probability_QS.sum(dim=0).nonzero().squeeze(1)
    nodes_at_once = max(1, BATCH // len(reached))
    total = 0.0
    for at in range(0, len(t_Q), nodes_at_once):
        t_q = t_Q[at : at + nodes_at_once]
        noisy = states_SL[reached].repeat(len(t_q), 1)
        nats = model.loss(
            clean_L.expand(len(noisy), -1),
            t_B=t_q.repeat_interleave(len(reached)),
            xt_BL=noisy,
        ).double()
        chance_qs = probability_QS[at : at + nodes_at_once][:, reached]
        expected_q = (chance_qs * nats.view(len(t_q), -1)).sum(dim=1)
        total += float(weight_Q[at : at + nodes_at_once] @ expected_q)
    return total


@torch.no_grad()
def decoder_table(model: ScoreModel, t_min: float, length: int) -> Tensor:
    """P(clean sequence | state at t_min) of the bound's decoder, [states, clean sequences]."""
    graph = model.graph
    sigma = model.schedule.sigma(torch.tensor([t_min], dtype=torch.float64))
    states_SL = all_states(graph.num_states, length)
    score_SLV = model.log_score(states_SL, sigma.expand(len(states_SL))).double().exp()
    # s_y T(y -> x): the joint chance of y before and x after, up to a constant.
    clean_N = torch.arange(graph.num_tokens)
    jump_NV = graph.transition_probabilities(clean_N, sigma.expand(len(clean_N)))
    jump_SLN = jump_NV.t()[states_SL]
    if graph.mask_id is not None:
        # A visible token is known, so the score says nothing there.
        visible = (states_SL != graph.mask_id).unsqueeze(-1)
        score_SLV = torch.where(visible, torch.ones_like(score_SLV), score_SLV)
    weight_SLN = score_SLV[..., : graph.num_tokens] * jump_SLN
    law_SLN = weight_SLN / weight_SLN.sum(-1, keepdim=True)
    clean_CL = all_states(graph.num_tokens, length)
    parts = [law_SLN[:, place, clean_CL[:, place]] for place in range(length)]
    return torch.stack(parts).prod(dim=0)


def exact_reconstruction_nats(model: ScoreModel, clean_L: Tensor, t_min: float) -> float:
    """E[-log p(x0 | x_tmin)] of one sequence, every x_tmin visited."""
    graph, length = model.graph, len(clean_L)
    sigma = model.schedule.sigma(torch.full((length,), t_min, dtype=torch.float64))
    law_LV = graph.transition_probabilities(clean_L, sigma)
    states_SL = all_states(graph.num_states, length)
    probability_S = law_LV[torch.arange(length), states_SL].prod(dim=1)
    clean_CL = all_states(graph.num_tokens, length)
    column = int((clean_CL == clean_L).all(dim=1).nonzero())
    nats_S = -torch.log(decoder_table(model, t_min, length)[:, column])
    return float(torch.where(probability_S > 0, probability_S * nats_S, 0.0).sum())


@torch.no_grad()
def exact_log_likelihoods(
    model: ScoreModel, t_min: float, length: int, *, num_steps: int = 150
) -> Tensor:
    """log p(x0) of every sequence under prior, reverse process and decoder, [clean sequences].

    The reverse process's master equation is integrated with Runge-Kutta's fourth-order rule, in
    equal steps of a quantile of time that is slow where rates are high.
    """
    graph, schedule = model.graph, model.schedule
    states_SL = all_states(graph.num_states, length)
    count = len(states_SL)
    quantile_T = torch.linspace(1.0, 0.0, 2 * num_steps + 1, dtype=torch.float64)
    times_T, pace_T = weighted_times(quantile_T, schedule, t_min=t_min, bounded=False)
    sigma_T, rate_T = schedule.sigma(times_T), schedule.rate(times_T) * pace_T
    score_RLV = torch.cat(
        [
            model.log_score(
                states_SL.repeat(len(part), 1), part.repeat_interleave(count)
            ).double().exp()
            for part in sigma_T.split(max(1, BATCH // count))
        ]
    )  # fmt: skip
    score_TSLV = score_RLV.view(len(times_T), count, length, graph.num_states)
    jumps_TSLV = rate_T.view(-1, 1, 1, 1) * incoming_rates(graph, states_SL) * score_TSLV
    # Index of the state that has y at one place of x.
    place_value_L = graph.num_states ** torch.arange(length - 1, -1, -1)
    change_SLV = torch.arange(graph.num_states) - states_SL[:, :, None]
    target_SLV = torch.arange(count)[:, None, None] + change_SLV * place_value_L[:, None]

    def flow(law_S: Tensor, at: int) -> Tensor:
        moved_SLV = law_S[:, None, None] * jumps_TSLV[at]
        arrived_S = torch.zeros_like(law_S).index_add(0, target_SLV.flatten(), moved_SLV.flatten())
        return arrived_S - moved_SLV.sum((1, 2))

    if graph.mask_id is not None:
        keep = torch.exp(-sigma_T[0])
        prior_V = torch.full((graph.num_states,), float(keep) / graph.num_tokens).double()
        prior_V[graph.mask_id] = 1 - keep
    else:
        prior_V = torch.full((graph.num_states,), 1 / graph.num_states, dtype=torch.float64)
    law_S = prior_V[states_SL].prod(dim=1)
    step = 1.0 / num_steps
    for first in range(0, 2 * num_steps, 2):
        k1 = flow(law_S, first)
        k2 = flow(law_S + step / 2 * k1, first + 1)
        k3 = flow(law_S + step / 2 * k2, first + 1)
        k4 = flow(law_S + step * k3, first + 2)
        law_S = law_S + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return torch.log(law_S @ decoder_table(model, t_min, length))
