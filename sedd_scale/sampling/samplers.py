"""Reverse-time samplers: noise to tokens in a fixed number of steps, around tokens that are given.

Time runs over a uniform grid from 1 to `t_end`; a last step then removes what noise is left. Every
random number is a pure function of (seed, sample id, step, position), so a sample does not depend
on which others are drawn beside it or where. Draws are made in float64: Gumbel noise in single
precision cuts the tail of a categorical off and so lowers the temperature (arXiv 2409.02908).

B samples, L positions, M rows that may change, m rows of a chunk, V states, N tokens.
Source: arXiv 2310.16834, section 4.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sedd_scale.diffusion.corruption import keyed_uniforms
from sedd_scale.diffusion.reverse import (
    analytic_log_factor,
    analytic_probabilities,
    as_distribution,
    denoise_probabilities,
    draw_categorical,
    euler_log_factor,
    euler_probabilities,
)
from sedd_scale.diffusion.score_entropy import log_scores_from_logits
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.sampling import SAMPLERS
from sedd_scale.sampling.logits import LogitModel, logit_chunks

T_END = 1e-5


@torch.no_grad()
def sample(
    model: LogitModel,
    tokens_BL: Tensor,
    fixed_BL: Tensor,
    steps: int,
    sampler: str = "analytic",
    generator: torch.Generator | None = None,
    *,
    seed: int | Sequence[int] = 0,
    sample_ids_B: Sequence[int] | None = None,
    t_end: float = T_END,
) -> Tensor:
    """Draw tokens at the positions that are not fixed: int64 [B, L] on the CPU.

    Args:
        model: a `ScoreModel`, or anything with its graph, schedule, scaled, device and logits.
        tokens_BL: what stands at the fixed positions; other entries are ignored.
        fixed_BL: bool; these positions keep their token and condition the others.
        steps: steps from time 1 to `t_end`, each one network call at most; one more call denoises.
        sampler: "analytic" (Tweedie tau-leaping) or "euler".
        generator: gives the seed where there is no `seed` to remember.
        seed: one for all samples, or one a sample.
        sample_ids_B: which draw of its seed each sample is; 0..B-1 by default.
        t_end: time at which the last, denoising step begins.

    Raises:
        ConfigError: an unknown sampler, or fewer than one step.
        DataError: a fixed token that is not one of the N, or shapes that do not fit.
        CheckpointError: the network's outputs are not finite.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is unknown: choose {' or '.join(SAMPLERS)}")
    if steps < 1:
        raise ConfigError(f"steps={steps} is too few: give at least 1")
    if tokens_BL.dim() != 2 or tokens_BL.shape != fixed_BL.shape:
        raise DataError(
            f"tokens have shape {tuple(tokens_BL.shape)} and fixed positions "
            f"{tuple(fixed_BL.shape)}: give two equal shapes [B, L]"
        )
    fixed_BL = fixed_BL.bool()
    model.graph.check_tokens(tokens_BL[fixed_BL])
    batch, length = tokens_BL.shape
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    draws = _Draws(
        seeds=[seed] * batch if isinstance(seed, int) else list(seed),
        ids=list(range(batch)) if sample_ids_B is None else list(sample_ids_B),
        length=length,
        device=model.device,
    )
    assert len(draws.seeds) == len(draws.ids) == batch, (len(draws.seeds), len(draws.ids), batch)
    fixed_BL = fixed_BL.to(model.device)
    given_BL = tokens_BL.to(model.device, torch.int64)
    if model.graph.mask_id is not None:
        state_BL = torch.where(fixed_BL, given_BL, model.graph.mask_id)
        run = _run_absorb
    else:
        state_BL = torch.where(fixed_BL, given_BL, draws.prior(model.graph.num_tokens))
        run = _run_uniform
    free_R = (~fixed_BL).flatten()
    for step in _time_steps(model, steps, sampler, t_end):
        run(model, state_BL, free_R, step, draws)
    return state_BL.cpu()


class _Step(NamedTuple):
    """One step of the grid; scalars are float64 tensors on the CPU.

    `size` is 0 for the denoising step, whose `sigma_s` is 0.
    """

    number: int
    sampler: str
    sigma_t: Tensor
    sigma_s: Tensor
    rate: Tensor
    rate_over_expm1: Tensor
    size: float


def _time_steps(model: LogitModel, steps: int, sampler: str, t_end: float) -> Iterator[_Step]:
    times = torch.from_numpy(np.linspace(1.0, t_end, steps + 1))
    sigma = model.schedule.sigma(times)
    rate, ratio = model.schedule.rate(times), model.schedule.rate_over_expm1(times)
    for k in range(steps):
        size = float(times[k] - times[k + 1])
        yield _Step(k, sampler, sigma[k], sigma[k + 1], rate[k], ratio[k], size)
    zero = torch.zeros_like(sigma[-1])
    yield _Step(steps, "denoise", sigma[-1], zero, rate[-1], ratio[-1], 0.0)


class _Draws:
    """Uniforms of a batch of samples, keyed by each sample's seed and id."""

    def __init__(
        self, *, seeds: list[int], ids: list[int], length: int, device: torch.device
    ) -> None:
        self.seeds, self.ids, self.length, self.device = seeds, ids, length, device

    def uniform(self, purpose: str, step: int) -> Tensor:
        """Float64 in [0, 1), [B * L]."""
        rows = [
            keyed_uniforms(self.length, seed=seed, stream=f"sample/{purpose}", step=step, sample=i)
            for seed, i in zip(self.seeds, self.ids)
        ]
        flat = np.concatenate(rows) if rows else np.empty(0)
        return torch.from_numpy(flat).to(self.device)

    def prior(self, num_tokens: int) -> Tensor:
        """Uniformly drawn tokens [B, L]."""
        tokens = (self.uniform("prior", 0) * num_tokens).long().clamp(max=num_tokens - 1)
        return tokens.view(len(self.ids), self.length)


def _run_absorb(
    model: LogitModel, state_BL: Tensor, free_R: Tensor, step: _Step, draws: _Draws
) -> None:
    """One step in place: masked positions leave the mask with their probability, or stay.

    The token of a position that leaves has probability e^z / sum e^z whatever the step, so only
    positions that leave need a categorical draw.
    """
    flat_R = state_BL.view(-1)
    num_tokens, mask_id = model.graph.num_tokens, model.graph.mask_id
    assert mask_id is not None
    rows_M = (free_R & (flat_R == mask_id)).nonzero().squeeze(1)
    if not len(rows_M):
        return
    log_factor = _absorb_log_factor(model, step)
    leave_M = draws.uniform("leave", step.number)[rows_M]
    token_M = draws.uniform("token", step.number)[rows_M]
    sigma_B = step.sigma_t.to(model.device).expand(len(state_BL))
    drawn_M = torch.full_like(rows_M, mask_id)
    for chunk, logits_mV in logit_chunks(model, state_BL, sigma_B, rows_M):
        logits_mN = logits_mV[:, :num_tokens]
        if log_factor is None:
            leaving = torch.ones_like(rows_M[chunk], dtype=torch.bool)
        else:
            # A sum of probabilities above 1 (an untrained network) leaves no chance of staying.
            log_sum_m = torch.logsumexp(logits_mN.double(), dim=1)
            leaving = leave_M[chunk] < torch.exp(log_sum_m + log_factor.to(model.device))
        weights = logits_mN[leaving].double()
        weights = (
            torch.exp(weights - weights.amax(dim=1, keepdim=True)) if len(weights) else weights
        )
        drawn_M[chunk][leaving] = draw_categorical(weights, token_M[chunk][leaving])
    flat_R[rows_M] = drawn_M


def _absorb_log_factor(model: LogitModel, step: _Step) -> Tensor | None:
    """ln of what e^z is multiplied by to be a probability of leaving; None where all leave."""
    num_tokens, scaled = model.graph.num_tokens, model.scaled
    if step.sampler == "denoise":
        return None
    if step.sampler == "euler":
        return euler_log_factor(
            step.size,
            rate=step.rate,
            rate_over_expm1=step.rate_over_expm1,
            num_tokens=num_tokens,
            scaled=scaled,
        )
    return analytic_log_factor(step.sigma_t, step.sigma_s, num_tokens=num_tokens, scaled=scaled)


def _run_uniform(
    model: LogitModel, state_BL: Tensor, free_R: Tensor, step: _Step, draws: _Draws
) -> None:
    """One step in place: every free position is drawn again from its row of the step's table."""
    flat_R = state_BL.view(-1)
    rows_M = free_R.nonzero().squeeze(1)
    if not len(rows_M):
        return
    uniform_M = draws.uniform("token", step.number)[rows_M]
    sigma_B = step.sigma_t.to(model.device).expand(len(state_BL))
    drawn_M = torch.empty_like(rows_M)
    for chunk, logits_mV in logit_chunks(model, state_BL, sigma_B, rows_M):
        states_m = flat_R[rows_M[chunk]]
        sigma_m, sigma_s_m, rate_m = (
            scalar.to(model.device).expand(len(states_m))
            for scalar in (step.sigma_t, step.sigma_s, step.rate)
        )
        log_score_mV = log_scores_from_logits(
            logits_mV, states_m, sigma_m, graph=model.graph, scaled=False
        )
        if step.sampler == "denoise":
            table_mV = denoise_probabilities(log_score_mV, states_m, sigma_m, model.graph)
        elif step.sampler == "euler":
            table_mV = euler_probabilities(log_score_mV, states_m, step.size, rate_m, model.graph)
        else:
            table_mV = analytic_probabilities(
                log_score_mV, states_m, sigma_m, sigma_s_m, model.graph
            )
        drawn_M[chunk] = draw_categorical(as_distribution(table_mV), uniform_M[chunk])
    flat_R[rows_M] = drawn_M
