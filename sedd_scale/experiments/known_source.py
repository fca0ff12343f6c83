"""A source whose ratios are known: a chain over a few tokens, some of which never follow others.

All its sequences are visited, so the ratios p_t(y) / p_t(x) of every noisy sequence x and of those
one token away are exact. Training sequences may be damaged: with `noise` each token is replaced by
a random one at the given rate; with `missing` each is left out at that rate, and the next ones of
the chain close up.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_scale.diffusion.graphs import Graph
from sedd_scale.model.score_model import ScoreModel

Draw = Callable[[int, torch.Generator], Tensor]

TOKENS, LENGTH = 4, 3
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # move probabilities at which scores are compared


def chain_law() -> tuple[Tensor, Tensor]:
    """Of the source: the first token's probabilities [N], and the next one's given one [N, N]."""
    follow_NN = torch.tensor(
        [[0.6, 0.3, 0.1, 0.0], [0.0, 0.2, 0.5, 0.3], [0.3, 0.0, 0.3, 0.4], [0.5, 0.4, 0.0, 0.1]],
        dtype=torch.float64,
    )
    return torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), follow_NN


def source() -> tuple[Tensor, Tensor]:
    """All sequences [C, LENGTH] and their probabilities [C]; no token is followed by every one."""
    first_N, follow_NN = chain_law()
    clean_CL = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
    law_C = first_N[clean_CL[:, 0]]
    for place in range(1, LENGTH):
        law_C = law_C * follow_NN[clean_CL[:, place - 1], clean_CL[:, place]]
    return clean_CL, law_C


def drawn(count: int, generator: torch.Generator) -> Tensor:
    """Sequences of the source, [count, LENGTH]."""
    clean_CL, law_C = source()
    return clean_CL[torch.multinomial(law_C, count, replacement=True, generator=generator)]


def damaged(kind: str, rate: float) -> Draw:
    """A draw of sequences [count, LENGTH] that are damaged in one of the ways of `DAMAGE`."""

    def with_noise(count: int, generator: torch.Generator) -> Tensor:
        clean_BL = drawn(count, generator)
        hit_BL = torch.rand(clean_BL.shape, generator=generator) < rate
        other_BL = torch.randint(TOKENS, clean_BL.shape, generator=generator)
        return torch.where(hit_BL, other_BL, clean_BL)

    def with_gaps(count: int, generator: torch.Generator) -> Tensor:
        first_N, follow_NN = chain_law()
        token_B = torch.multinomial(first_N, count, replacement=True, generator=generator)
        rows: list[list[int]] = [[] for _ in range(count)]
        while min(map(len, rows)) < LENGTH:
            kept_B = torch.rand(count, generator=generator) >= rate
            for row, token, kept in zip(rows, token_B.tolist(), kept_B.tolist(), strict=True):
                if kept:
                    row.append(token)
            token_B = torch.multinomial(follow_NN[token_B], 1, generator=generator).squeeze(1)
        return torch.tensor([row[:LENGTH] for row in rows])

    return {"noise": with_noise, "missing": with_gaps}[kind]


def exact_ratios(graph: Graph, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every state [S, L], its probability [S] under the noise, and p(y) / p(x) [S, L, V].

    States of probability 0 have ratios of 0.
    """
    clean_CL, law_C = source()
    states_SL = torch.tensor(list(itertools.product(range(graph.num_states), repeat=LENGTH)))
    noise_CLV = graph.transition_probabilities(clean_CL, sigma.expand(len(clean_CL)))
    reach_CS = torch.ones(len(clean_CL), len(states_SL), dtype=torch.float64)
    for place in range(LENGTH):
        reach_CS *= noise_CLV[:, place, states_SL[:, place]]
    law_S = law_C @ reach_CS
    ratios = torch.zeros(*states_SL.shape, graph.num_states, dtype=torch.float64)
    for place in range(LENGTH):
        value = graph.num_states ** (LENGTH - 1 - place)
        for token in range(graph.num_states):
            moved_S = torch.arange(len(states_SL)) + (token - states_SL[:, place]) * value
            ratios[:, place, token] = torch.where(law_S > 0, law_S[moved_S] / law_S, 0.0)
    return states_SL, law_S, ratios


def compare(model: ScoreModel) -> dict[str, float]:
    """`log_error` and, with a mask, `outside`, of a model's scores against the exact ratios."""
    graph = model.graph
    errors, outside = [], []
    with torch.no_grad():
        for level in _LEVELS:
            sigma = -torch.log1p(torch.tensor(-level, dtype=torch.float64))
            states_SL, law_S, ratio_SLV = exact_ratios(graph, sigma)
            score_SLV = model.log_score(states_SL, sigma.expand(len(states_SL))).double()
            counts_SLV = _compared(graph, states_SL)
            weight_SLV = law_S[:, None, None] * ratio_SLV * counts_SLV
            difference_SLV = (score_SLV - ratio_SLV.clamp(min=1e-300).log()).abs()
            # The network's score of what is not compared may be infinite.
            error = torch.where(weight_SLV > 0, weight_SLV * difference_SLV, 0.0).sum()
            errors.append(float(error / weight_SLV.sum()))
            if graph.mask_id is not None:
                given_SLV = torch.where(counts_SLV, score_SLV.exp() * law_S[:, None, None], 0.0)
                beyond = torch.where(ratio_SLV == 0, given_SLV, 0.0).sum()
                outside.append(float(beyond / given_SLV.sum()))
    found = {"log_error": sum(errors) / len(errors)}
    if outside:
        found["outside"] = sum(outside) / len(outside)
    return found


def _compared(graph: Graph, states_SL: Tensor) -> Tensor:
    """Which scores the reverse process uses, bool [S, L, V]: jumps to other tokens."""
    tokens_V = torch.arange(graph.num_states)
    if graph.mask_id is None:
        return tokens_V != states_SL[..., None]
    return (states_SL == graph.mask_id)[..., None] & (tokens_V != graph.mask_id)
