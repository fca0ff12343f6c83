"""Does a model learn the ratios of a source that is known, and nothing outside its support?

    sedd-scale experiment coverage --output runs/support_coverage

The source is a chain over a few tokens in which some tokens never follow some others. All its
sequences are visited, so the ratios p_t(y) / p_t(x) of every noisy sequence x and of those one
token away are exact. A small network is trained under each graph and schedule, and its scores are
compared with them, at times spread over the move probability:

    log error   the mean of |log s - log of the true ratio|, weighted by p_t(x) and the true ratio
    outside     absorb: the share of the scores at masked positions that goes to tokens that cannot
                stand there, beside 0 for the truth
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sedd_scale.experiments.report_files import write_report_files

# The last is uniform too, under the mean parametrisation.
TOKENS, LENGTH = 4, 3
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # move probabilities at which scores are compared


def measure(
    graph: str,
    schedule: str,
    *,
    steps: int,
    seed: int,
    draw: Callable[[int, Any], Any] | None = None,
) -> dict[str, Any]:
    """Train one model and compare its scores.

    Args:
        graph: of `GRAPHS`.
        steps: of 256 sequences each.
        seed: of weights and data.
        draw: gives [count, LENGTH] training sequences; those of the source by default.
    """
    import torch

    from sedd_scale.config import config_from_dict
    from sedd_scale.model.score_model import ScoreModel
    from sedd_scale.parallel.layout import initialize_layout

    start = time.perf_counter()
    name, _, parametrisation = graph.partition("-")
    config = config_from_dict(
        {
            "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "cond_dim": 32,
                      "dropout": 0.0, "vocab_size": TOKENS,
                      "parametrisation": parametrisation or "score"},
            "graph": {"name": name},
            "noise": {"name": schedule, "sigma_max": 8.0},
            "training": {"seed": seed},
        }
    )  # fmt: skip
    model = ScoreModel(config, TOKENS, initialize_layout(), block_length=LENGTH)
    draw = draw or drawn
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    t_min = config.noise.t_min
    for _ in range(steps):
        clean_BL = draw(256, generator)
        u_B = (torch.arange(256) + torch.rand(256, generator=generator)).double() / 256
        loss = model.loss(clean_BL, t_B=t_min + (1 - t_min) * u_B, generator=generator).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
    return {
        "graph": graph,
        "schedule": schedule,
        "seed": seed,
        **compare(model.eval()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def drawn(count: int, generator: Any) -> Any:
    """Sequences of the source, [count, LENGTH]."""
    import torch

    clean_CL, law_C = source()
    return clean_CL[torch.multinomial(law_C, count, replacement=True, generator=generator)]


def chain_law() -> tuple[Any, Any]:
    """Of the source: the first token's probabilities [N], and the next one's given one [N, N]."""
    import torch

    follow_NN = torch.tensor(
        [[0.6, 0.3, 0.1, 0.0], [0.0, 0.2, 0.5, 0.3], [0.3, 0.0, 0.3, 0.4], [0.5, 0.4, 0.0, 0.1]],
        dtype=torch.float64,
    )
    return torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), follow_NN


def source() -> tuple[Any, Any]:
    """All sequences [C, LENGTH] and their probabilities [C]; no token is followed by every one."""
    import torch

    first_N, follow_NN = chain_law()
    clean_CL = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
    law_C = first_N[clean_CL[:, 0]]
    for place in range(1, LENGTH):
        law_C = law_C * follow_NN[clean_CL[:, place - 1], clean_CL[:, place]]
    return clean_CL, law_C


def compare(model: Any) -> dict[str, float]:
    """`log_error` and, with a mask, `outside`, of a model's scores against the exact ratios."""
    import torch

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


def exact_ratios(graph: Any, sigma: Any) -> tuple[Any, Any, Any]:
    """Every state [S, L], its probability [S] under the noise, and p(y) / p(x) [S, L, V].

    States of probability 0 have ratios of 0.
    """
    import torch

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


def _compared(graph: Any, states_SL: Any) -> Any:
    """Which scores the reverse process uses, bool [S, L, V]: jumps to other tokens."""
    import torch

    tokens_V = torch.arange(graph.num_states)
    if graph.mask_id is None:
        return tokens_V != states_SL[..., None]
    return (states_SL == graph.mask_id)[..., None] & (tokens_V != graph.mask_id)


def outside_of(row: dict[str, Any]) -> str:
    """A row's share outside the support, for a table."""
    return f"{row['outside']:.5f}" if "outside" in row else "everything is possible"


def write_report(rows: list[dict[str, Any]], output: Path, *, steps: int, command: str) -> None:
    """report.json, report.md and report.png."""
    lines = [
        "# Support coverage: learned scores beside the true ratios",
        "",
        f"Chain over {TOKENS} tokens, {LENGTH} positions, {steps:,} steps of 256 sequences.",
        "",
        "| graph | schedule | seed | log error | outside the support |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['graph']} | {row['schedule']} | {row['seed']} | {row['log_error']:.4f} | "
            f"{outside_of(row)} |"
        )

    def draw(axes: Any) -> None:
        names = [f"{row['graph']}, {row['schedule']}, seed {row['seed']}" for row in rows]
        axes.barh(names[::-1], [row["log_error"] for row in rows][::-1])
        axes.set_xlabel("mean error of log scores, nats")

    write_report_files(
        output,
        {"steps": steps, "rows": rows},
        lines,
        draw,
        command=command,
        picture="log errors",
        size=(7.0, 0.5 * len(rows) + 1.2),
    )
