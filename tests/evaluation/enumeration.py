"""Exact answers for networks small enough to visit every state: the oracle of the bound."""

import itertools

import numpy as np
import torch
from torch import Tensor

from sedd_scale.config import config_from_dict
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout

BATCH = 4096


def tiny_model(
    graph: str,
    noise: str,
    *,
    num_tokens: int = 3,
    block_length: int = 2,
    seed: int = 0,
    tensor: int = 1,
    time_conditioning: bool = True,
    objective: str = "score_entropy",
    **training: object,
) -> ScoreModel:
    """A random network over a handful of tokens, in eval mode, with far from equal scores."""
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
def exact_diffusion_nats(model: ScoreModel, clean_L: Tensor, t_min: float) -> float:
    """Integral over t of the expected score entropy of one sequence, every x_t visited."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    t_Q = torch.from_numpy(t_min + (1 - t_min) * (nodes + 1) / 2)
    weight_Q = torch.from_numpy(weights * (1 - t_min) / 2)
    states_SL = all_states(model.graph.num_states, len(clean_L))
    law_QLV = model.graph.transition_probabilities(
        clean_L.expand(len(t_Q), -1), model.schedule.sigma(t_Q)
    )
    index_QLS = states_SL.t().expand(len(t_Q), -1, -1)
    probability_QS = law_QLV.gather(2, index_QLS).prod(dim=1)
    loss_QS = torch.zeros_like(probability_QS)
    for q, t in enumerate(t_Q):
        reachable = probability_QS[q] > 0
        noisy = states_SL[reachable]
        loss_QS[q, reachable] = model.loss(
            clean_L.expand(len(noisy), -1), t_B=t.expand(len(noisy)), xt_BL=noisy
        ).double()
    return float((weight_Q * (probability_QS * loss_QS).sum(dim=1)).sum())


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
    model: ScoreModel, t_min: float, length: int, *, num_steps: int = 1500
) -> Tensor:
    """log p(x0) of every sequence under prior, reverse process and decoder, [clean sequences].

    The reverse process's master equation is integrated with Runge-Kutta's fourth-order rule.
    """
    graph, schedule = model.graph, model.schedule
    states_SL = all_states(graph.num_states, length)
    count = len(states_SL)
    times = torch.linspace(1.0, t_min, 2 * num_steps + 1, dtype=torch.float64)
    sigma, rate = schedule.sigma(times), schedule.rate(times)
    tokens = states_SL.repeat(len(times), 1)
    sigmas = sigma.repeat_interleave(count)
    score_TSLV = torch.cat(
        [
            model.log_score(tokens[at : at + BATCH], sigmas[at : at + BATCH]).double().exp()
            for at in range(0, len(tokens), BATCH)
        ]
    ).view(len(times), count, length, graph.num_states)
    incoming_SLV = graph.incoming_rates(states_SL)
    jumps_TSLV = rate.view(-1, 1, 1, 1) * incoming_SLV * score_TSLV
    # Index of the state that has y at one place of x.
    place_value = graph.num_states ** torch.arange(length - 1, -1, -1)
    index_S = (states_SL * place_value).sum(dim=1)
    generator_TSS = torch.zeros(len(times), count, count, dtype=torch.float64)
    for place in range(length):
        for y in range(graph.num_states):
            target_S = index_S + (y - states_SL[:, place]) * place_value[place]
            generator_TSS[:, index_S, target_S] += jumps_TSLV[:, :, place, y]
    generator_TSS -= torch.diag_embed(generator_TSS.sum(-1))
    if graph.mask_id is not None:
        keep = torch.exp(-sigma[0])
        prior_V = torch.full((graph.num_states,), float(keep) / graph.num_tokens).double()
        prior_V[graph.mask_id] = 1 - keep
    else:
        prior_V = torch.full((graph.num_states,), 1 / graph.num_states, dtype=torch.float64)
    law_S = prior_V[states_SL].prod(dim=1)
    step = float(times[0] - times[2])
    for k in range(num_steps):
        first, middle, last = generator_TSS[2 * k : 2 * k + 3]
        k1 = law_S @ first
        k2 = (law_S + step / 2 * k1) @ middle
        k3 = (law_S + step / 2 * k2) @ middle
        k4 = (law_S + step * k3) @ last
        law_S = law_S + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return torch.log(law_S @ decoder_table(model, t_min, length))
