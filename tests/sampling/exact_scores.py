"""A model that knows the true ratios of a tiny distribution, and a sampler's exact law on it."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sedd_scale.diffusion.graphs import Absorb, Graph, make_graph
from sedd_scale.diffusion.row_law import row_law
from sedd_scale.diffusion.schedules import Schedule, make_schedule
from sedd_scale.diffusion.score_entropy import log_expm1
from sedd_scale.model.logit_model import LogitModel
from tests.diffusion.reference import (
    analytic_probabilities,
    ancestral_probabilities,
    as_distribution,
    denoise_probabilities,
    euler_probabilities,
)
from tests.evaluation.enumeration import all_states


class ExactScores(LogitModel):
    """log s(x, sigma)_y = log p_sigma(x with y at a position) - log p_sigma(x), by enumeration."""

    device = torch.device("cpu")
    time_conditioned = True

    def __init__(
        self,
        graph: str,
        noise: str,
        *,
        num_tokens: int = 3,
        length: int = 2,
        scaled: bool = False,
        mean: bool = False,
    ) -> None:
        self.graph: Graph = make_graph(graph, num_tokens)
        self.schedule: Schedule = make_schedule(noise, sigma_max=10.0)
        self.scaled = scaled
        self.mean = mean
        self.law = row_law(self.graph, scaled=scaled and graph == "absorb", mean=mean)
        self.length = length
        generator = torch.Generator().manual_seed(1)
        self.data_C = torch.softmax(
            1.5 * torch.randn(num_tokens**length, generator=generator, dtype=torch.float64), 0
        )
        self.clean_CL = all_states(num_tokens, length)
        self.calls = 0

    def marginal(self, states_SL: Tensor, sigma: Tensor) -> Tensor:
        """p_sigma of each state, [S]."""
        law_CLV = self.graph.transition_probabilities(
            self.clean_CL, sigma.expand(len(self.clean_CL))
        )
        parts = [law_CLV[:, place, states_SL[:, place]] for place in range(self.length)]
        return self.data_C @ torch.stack(parts).prod(dim=0)

    def log_score(self, states_SL: Tensor, sigma: Tensor) -> Tensor:
        """[S, L, V] for one noise level."""
        own_S = self.marginal(states_SL, sigma)
        score = torch.empty(*states_SL.shape, self.graph.num_states, dtype=torch.float64)
        for place in range(self.length):
            for y in range(self.graph.num_states):
                other_SL = states_SL.clone()
                other_SL[:, place] = y
                score[:, place, y] = self.marginal(other_SL, sigma) / own_S
        return score.clamp(min=1e-300).log()

    def clean_laws(self, state_L: Tensor, sigma: Tensor) -> Tensor:
        """p(clean token | noisy tokens of all other positions), [L, N], times any constants."""
        law_CLV = self.graph.transition_probabilities(
            self.clean_CL, sigma.expand(len(self.clean_CL))
        )
        laws = torch.zeros(self.length, self.graph.num_tokens, dtype=torch.float64)
        for place in range(self.length):
            others = [other for other in range(self.length) if other != place]
            seen_C = self.data_C * torch.stack(
                [law_CLV[:, other, state_L[other]] for other in others]
            ).prod(dim=0)
            laws[place].index_add_(0, self.clean_CL[:, place], seen_C)
        return 3.0 * laws

    def log_scores(self, tokens_BL: Tensor, sigma_B: Tensor) -> Tensor:
        """[B, L, V], each sequence at its own noise level."""
        scores = torch.empty(*tokens_BL.shape, self.graph.num_states, dtype=torch.float64)
        for sigma in sigma_B.unique():
            same = sigma_B == sigma
            scores[same] = self.log_score(tokens_BL[same], sigma)
        return scores

    def rows(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        """All logits of a position: the model is a table."""
        assert ends_BE is None
        self.calls += 1
        if self.mean:
            laws = [self.clean_laws(*pair) for pair in zip(tokens_BL, sigma_B, strict=True)]
            logits = torch.stack(laws).log().flatten(0, 1)[rows_M]
            return self.law.with_known_constant(logits)
        logits = self.log_scores(tokens_BL, sigma_B)
        if self.scaled:
            logits += (log_expm1(sigma_B) + math.log(self.graph.num_tokens))[:, None, None]
        return logits.flatten(0, 1)[rows_M]

    def logits_of(self, rows_MW: Tensor) -> Tensor:
        return rows_MW


class RandomScores(ExactScores):
    """Random logits for every state, far from any distribution's ratios; scaled, timeless."""

    time_conditioned = False

    def __init__(self, graph: str, noise: str, *, num_tokens: int = 3, length: int = 3) -> None:
        super().__init__(graph, noise, num_tokens=num_tokens, length=length, scaled=True)
        generator = torch.Generator().manual_seed(7)
        count, states = self.graph.num_states**length, self.graph.num_states
        self.table = 1.5 * torch.randn(
            count, length, states, generator=generator, dtype=torch.float64
        )

    def raw(self, states_SL: Tensor) -> Tensor:
        place_value = self.graph.num_states ** torch.arange(self.length - 1, -1, -1)
        return self.table[(states_SL * place_value).sum(1)]

    def log_score(self, states_SL: Tensor, sigma: Tensor) -> Tensor:
        return self.raw(states_SL) - log_expm1(sigma) - math.log(self.graph.num_tokens)

    def log_scores(self, tokens_BL: Tensor, sigma_B: Tensor) -> Tensor:
        return self.log_score(tokens_BL, sigma_B[:, None, None])


def chain_law(
    model: ExactScores,
    steps: int,
    sampler: str,
    t_end: float,
    fixed: dict[int, int],
    *,
    remask: float = 0.0,
) -> Tensor:
    """Probability of every state after the whole chain, [V^L], from the steps' tables alone."""
    graph = model.graph
    states_SL = all_states(graph.num_states, model.length)
    prior_V = torch.full((graph.num_states,), 1 / graph.num_tokens, dtype=torch.float64)
    if graph.mask_id is not None:
        prior_V = torch.zeros_like(prior_V)
        prior_V[graph.mask_id] = 1.0
    parts = []
    for place in range(model.length):
        at_V = prior_V
        if place in fixed:
            at_V = torch.zeros_like(prior_V)
            at_V[fixed[place]] = 1.0
        parts.append(at_V[states_SL[:, place]])
    law_S = torch.stack(parts).prod(dim=0)
    times = torch.linspace(1.0, t_end, steps + 1, dtype=torch.float64)
    sigmas = model.schedule.sigma(times)
    for k in range(steps + 1):
        sigma_S = sigmas[k].expand(len(states_SL))
        log_score = model.log_score(states_SL, sigmas[k])
        if k == steps:
            table_SLV = denoise_probabilities(log_score, states_SL, sigma_S, graph)
        elif sampler == "analytic":
            table_SLV = analytic_probabilities(
                log_score, states_SL, sigma_S, sigmas[k + 1].expand(len(states_SL)), graph
            )
        elif sampler == "ancestral":
            assert isinstance(graph, Absorb)
            move_t, move_s = model.schedule.move_probability(times[k : k + 2])
            table_SLV = ancestral_probabilities(
                log_score,
                states_SL,
                move_t.expand(len(states_SL)),
                move_s.expand(len(states_SL)),
                graph,
                remask=remask,
            )
        else:
            rate = model.schedule.rate(times[k])
            size = float(times[k] - times[k + 1])
            table_SLV = euler_probabilities(
                log_score, states_SL, size, rate.expand(len(states_SL)), graph
            )
        table_SLV = as_distribution(table_SLV)
        for place in fixed:
            table_SLV[:, place] = torch.nn.functional.one_hot(
                states_SL[:, place], graph.num_states
            ).double()
        step_SS = torch.stack(
            [table_SLV[:, place, states_SL[:, place]] for place in range(model.length)]
        ).prod(dim=0)
        law_S = law_S @ step_SS
    return law_S


class TimedScores(RandomScores):
    """Random logits that grow with the move probability: the token's law depends on the time."""

    time_conditioned = True

    def log_score(self, states_SL: Tensor, sigma: Tensor) -> Tensor:
        return (
            self.raw(states_SL) * self.move(sigma)
            - log_expm1(sigma)
            - math.log(self.graph.num_tokens)
        )

    @staticmethod
    def move(sigma: Tensor) -> Tensor:
        """m of a noise level."""
        return -torch.expm1(-sigma)


def order_law(model: RandomScores, sampler: str, groups: Sequence[int]) -> Tensor:
    """Law of the clean sequence when so many positions are filled a call, [N^L], over all paths."""
    num_tokens, mask = model.graph.num_tokens, model.graph.num_tokens
    law = torch.zeros(num_tokens**model.length, dtype=torch.float64)

    def walk(state: list[int], call: int, probability: float) -> None:
        masked = [place for place, token in enumerate(state) if token == mask]
        if not masked:
            index = 0
            for token in state:
                index = index * num_tokens + token
            law[index] += probability
            return
        rows = torch.softmax(model.raw(torch.tensor([state]))[0, :, :num_tokens], dim=-1)
        sure = {}
        for place in masked:
            row = rows[place].sort(descending=True).values
            sure[place] = {
                "first-hitting": 0.0,
                "confidence": float(row[0]),
                "margin": float(row[0] - row[1]),
                "entropy": float((row * row.log()).sum()),
            }[sampler]
        subsets = list(itertools.combinations(masked, groups[call]))
        totals = [sum(sure[place] for place in chosen) for chosen in subsets]
        surest = [chosen for chosen, total in zip(subsets, totals) if total == max(totals)]
        for chosen in surest:
            for tokens in itertools.product(range(num_tokens), repeat=len(chosen)):
                following, chance = list(state), probability / len(surest)
                for place, token in zip(chosen, tokens):
                    following[place] = token
                    chance *= float(rows[place, token])
                walk(following, call + 1, chance)

    walk([mask] * model.length, 0, 1.0)
    return law


def hitting_law(model: TimedScores) -> Tensor:
    """Law of two positions each filled at its own time, [N^2], by integrals over both times.

    The first leaves at move probability m(1) a, of density 2a, the second at m(1) a b, b uniform
    (the greater of two uniforms, and the lesser over it).
    """
    num_tokens, mask = model.graph.num_tokens, model.graph.num_tokens
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(24))
    nodes, weights = (nodes + 1) / 2, weights / 2
    start = float(model.schedule.move_probability(torch.ones((), dtype=torch.float64)))

    def token_law(state: list[int], place: int, move: Tensor) -> Tensor:
        logits_N = model.raw(torch.tensor([state]))[0, place, :num_tokens]
        return torch.softmax(logits_N * move[..., None], dim=-1)

    law_NN = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    second_move = start * nodes[:, None] * nodes
    density = (2 * nodes * weights)[:, None] * weights
    for place in (0, 1):
        first_KN = token_law([mask, mask], place, start * nodes)
        for token in range(num_tokens):
            state = [mask, mask]
            state[place] = token
            second_KKN = token_law(state, 1 - place, second_move)
            after_N = torch.einsum("ab,a,abn->n", density, first_KN[:, token], second_KKN)
            (law_NN[token] if place == 0 else law_NN[:, token]).add_(after_N / 2)
    return law_NN.flatten()
