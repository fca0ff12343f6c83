"""A bound on the negative log-likelihood of text: an integrated loss and its two ends.

For a block x0 of L tokens (arXiv 2310.16834, theorem 3.6), with the noise run from t_min to 1,

    -log p(x0)  <=  integral from t_min to 1 of  E[ score entropy of x_t ] dt      diffusion
                    + KL( p(x_1 | x0) || prior )                                   prior
                    + E[ -log p(x0 | x_tmin) ]                                     reconstruction

p is the model that draws x_1 from the prior, runs the reverse process with the learned rates to
t_min and decodes every position there independently. Any decoder gives a bound; this one is

    absorb    softmax of the logits at masked positions: the samplers' own last step;
    uniform   P(y) proportional to s_y T(x, y), with s_x = 1 and T the chance of the jump y -> x
              under the noise of t_min. It agrees with the samplers' last step to first order in
              that noise and, unlike it, never gives a token no chance.

The prior of `graph.prior_kl_per_token` leaves room for tokens not yet masked at time 1.

Score entropy is cross-entropy plus a price of scores that are not normalised. Normalised they give
a bound too, and under absorb that one is made of the same draws: `BoundResult.normalised`. Models
trained with cross-entropy have no other. A chain of steps (d3pm_absorb) has a sum in the place of
the integral, its last step being the decoder. An autoregressive model has its likelihood instead,
and a model without time conditioning a third protocol, any-order: see `chain_rule`.

Two protocols of the integral:

    low-variance  t stratified over each block's draws, masks antithetic between early and late
                  strata, and times and corruptions drawn where the loss is (see `importance`), with
                  weights; all three terms: a true bound.
    paper         t independent and uniform; the mean over [t_min, 1] stands for the integral over
                  [0, 1] and the ends are left out, which is how the paper's perplexities are made.

Every random number is a pure function of (seed, block, draw). A block's draws always share batches
with the same other draws, so a result is the same to the last digit on any number of ranks (with
equal --tensor, batch size and threads a process).
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sedd_scale.arrays import FloatArray, IntArray
from sedd_scale.diffusion.objectives import D3PMAbsorb
from sedd_scale.diffusion.score_entropy import mean_log_scores
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.evaluation import PROTOCOLS
from sedd_scale.evaluation.chain_rule import (
    evaluate_any_order,
    evaluate_left_to_right,
    within_spans,
)
from sedd_scale.evaluation.draw_plan import DEFAULT_DRAWS, Plan, make_plan
from sedd_scale.evaluation.finished_groups import FinishedGroups
from sedd_scale.evaluation.importance import masks_by_their_number, moves_with_an_event
from sedd_scale.evaluation.result import BoundResult, OtherNats
from sedd_scale.evaluation.shared_work import over_ranks
from sedd_scale.evaluation.standard_error import estimate_from_replicates
from sedd_scale.model.logit_model import LogitModel
from sedd_scale.sampling.chunks import rows_per_chunk
from sedd_scale.sampling.token_law import Finite

# Of the decoder's logits on a CPU, counted in float32.
CPU_CHUNK_BYTES = 16 * 2**20


@torch.no_grad()
def evaluate_bound(
    model: LogitModel,
    blocks_nL: IntArray | Tensor,
    *,
    draws: int | None = None,
    replicates: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    protocol: str = "low-variance",
    t_min: float | None = None,
    block_ids_n: Sequence[int] | IntArray | None = None,
    text_n: IntArray | None = None,
    context_n: IntArray | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    finished: FinishedGroups | None = None,
) -> BoundResult:
    """Estimate the bound on blocks of tokens; collective over the model's data-parallel ranks.

    Of an autoregressive model the likelihood itself, without draws.

    Args:
        blocks_nL: clean tokens, the same on every rank.
        draws: times per block (default 16; paper 1000), or orders (any-order 8).
        replicates: independent stratified samples the draws of a block are split into, a divisor of
            `draws`, at least 2; by default as few as give a reliable standard error. The paper
            protocol has one per draw.
        seed: of all draws.
        batch_size: sequences in one network call.
        t_min: where the integral begins; the model's noise.t_min by default. A chain of steps has
            none to choose.
        block_ids_n: what a block's draws are keyed by; its place by default.
        text_n: how many of each block's first tokens are text; the rest is padding, which keeps its
            clean tokens and has no part in the bound. None: all of them.
        context_n: how many of these come first and are given: they keep their clean tokens too, and
            the bound is that of the rest given them. None: none.
        on_progress: called with (groups of blocks done, all groups of this rank).
        finished: what a killed evaluation of the same had done, and where this one's is kept.

    Raises:
        ConfigError: draws, replicates, protocol, batch_size or t_min that cannot be used.
        DataError: no block, or a token that is not one of the model's.
        CheckpointError: the model's loss is not finite.
    """
    began = time.perf_counter()
    objective = model.objective
    blocks = torch.as_tensor(blocks_nL)
    if blocks.dim() != 2 or not blocks.numel():
        raise DataError(
            f"nothing to evaluate: the text gives blocks of shape {tuple(blocks.shape)}; give more "
            "text"
        )
    if blocks.dtype.is_floating_point or blocks.dtype.is_complex or blocks.dtype == torch.bool:
        raise DataError(f"token ids of type {blocks.dtype}: give integers")
    model.graph.check_tokens(blocks)
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r} is unknown: choose {' or '.join(PROTOCOLS)}")
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} is too small: give at least 1")
    ids_n = np.arange(len(blocks)) if block_ids_n is None else np.asarray(block_ids_n)
    assert ids_n.shape == (len(blocks),), ids_n.shape
    text_n = np.full(len(blocks), blocks.shape[1]) if text_n is None else np.asarray(text_n)
    context_n = np.zeros(len(blocks), dtype=np.int64) if context_n is None else context_n
    span_n2 = np.stack([np.asarray(context_n), text_n], axis=1)
    assert span_n2.shape == (len(blocks), 2), span_n2.shape
    if (span_n2[:, 0] >= span_n2[:, 1]).any():
        raise DataError(
            "a block has no token to predict: give each at least one behind its context"
        )
    deal = partial(over_ranks, model.layout, on_progress=on_progress, finished=finished)
    if model.causal:
        if protocol != "low-variance" or draws is not None or replicates is not None:
            raise ConfigError(
                "an autoregressive model's likelihood is exact: leave protocol, draws and "
                "replicates out"
            )
        return evaluate_left_to_right(
            model, blocks, batch_size=batch_size, span_n2=span_n2, deal=deal
        )
    if protocol == "any-order":
        return evaluate_any_order(
            model,
            blocks,
            orders=DEFAULT_DRAWS[protocol] if draws is None else draws,
            seed=seed,
            batch_size=batch_size,
            ids_n=ids_n,
            span_n2=span_n2,
            deal=deal,
        )
    if isinstance(objective, D3PMAbsorb):
        if t_min is not None:
            raise ConfigError(f"t_min={t_min}: the steps of d3pm_absorb are given; leave t_min out")
        t_min = 1.0 / objective.steps
    plan = make_plan(
        len(blocks),
        draws=draws,
        replicates=replicates,
        seed=seed,
        batch_size=batch_size,
        protocol=protocol,
        t_min=model.config.noise.t_min if t_min is None else t_min,
    )
    size = max(1, batch_size // plan.draws)
    groups = [slice(at, min(at + size, len(blocks))) for at in range(0, len(blocks), size)]

    def nats(which: int) -> _GroupNats:
        group = groups[which]
        return _group_nats(model, blocks[group], ids_n[group], span_n2[group], plan)

    found = deal(len(groups), nats)
    return _combine(model, [_GroupNats(*parts) for parts in found], span_n2, plan, began)


class _GroupNats(NamedTuple):
    """Nats of whole blocks: the integral by each draw [g, K, C], and decoding at t_min [g, R].

    C is 2 where there is a second integral, that of normalised scores, else 1.
    """

    diffusion_gKC: FloatArray
    reconstruction_gR: FloatArray
    network_calls: int


class _Draws(NamedTuple):
    """Sequences of one network call, each a draw of a block."""

    clean_BL: Tensor
    ids_B: IntArray
    """What the block's draws are keyed by."""
    span_B2: IntArray
    """Where the block's counted text begins and ends."""
    draw_B: IntArray
    """Which of the block's draws it is."""
    t_B: Tensor


def _group_nats(
    model: LogitModel, blocks_gL: Tensor, ids_g: IntArray, span_g2: IntArray, plan: Plan
) -> _GroupNats:
    timed = [plan.times(model, int(block)) for block in ids_g]
    times_gK = torch.stack([times for times, _ in timed])
    weights_gK = torch.stack([weights for _, weights in timed]).numpy()

    def draws_at(times_gD: Tensor) -> list[_Draws]:
        """A draw of each block at each of its times, batch by batch."""
        place_M, draw_M = np.divmod(np.arange(times_gD.numel()), times_gD.shape[1])
        batches = []
        for at in range(0, len(place_M), plan.batch_size):
            batch = slice(at, at + plan.batch_size)
            place_B = place_M[batch]
            of_blocks = blocks_gL[place_B], ids_g[place_B], span_g2[place_B]
            batches.append(_Draws(*of_blocks, draw_M[batch], times_gD.flatten()[batch]))
        return batches

    diffusion, calls = _in_batches(draws_at(times_gK), partial(_diffusion_nats, model, plan))
    diffusion = diffusion.reshape(*times_gK.shape, -1) * weights_gK[:, :, None]
    if not plan.has_ends:
        return _GroupNats(diffusion, np.empty((len(ids_g), 0)), calls)
    ends_gR = torch.full((len(ids_g), plan.replicates), plan.t_min, dtype=torch.float64)
    decoded, more = _in_batches(draws_at(ends_gR), partial(_reconstruction_nats, model, plan))
    return _GroupNats(diffusion, decoded.reshape(ends_gR.shape), calls + more)


def _in_batches(
    batches: Sequence[_Draws], nats: Callable[[_Draws], tuple[Tensor, int]]
) -> tuple[FloatArray, int]:
    """The nats of all draws, [M, C], and the network calls made."""
    parts, calls = [], 0
    for draws in batches:
        nats_BC, made = nats(draws)
        parts.append(nats_BC.double().cpu().numpy())
        calls += made
        bad = np.flatnonzero(~np.isfinite(parts[-1]).all(axis=1))
        if len(bad):
            raise CheckpointError(
                f"the bound of block {draws.ids_B[bad[0]]} is not finite: the checkpoint's "
                "weights are damaged or its training diverged; use another checkpoint"
            )
    return np.concatenate(parts), calls


def _diffusion_nats(model: LogitModel, plan: Plan, draws: _Draws) -> tuple[Tensor, int]:
    noisy_BL, weight_B = _corrupted(model, plan, draws, "noise")
    counted_BL = within_spans(draws.clean_BL, draws.span_B2)
    noise_B3 = model.objective.noise_columns(model.schedule, draws.t_B, training=False)
    normalised = model.law.when_normalised()
    laws = [model.law] if normalised is None else [model.law, normalised]
    nats_BC = model.losses(draws.clean_BL, noisy_BL, noise_B3, counted_BL, laws=laws)
    return nats_BC.double().cpu() * weight_B[:, None], len(noisy_BL)


def _reconstruction_nats(model: LogitModel, plan: Plan, draws: _Draws) -> tuple[Tensor, int]:
    """-log p(x0 | x_tmin) of each sequence with the decoder of the module's docstring."""
    clean_BL, t_B = draws.clean_BL, draws.t_B
    noisy_BL, weight_B = _corrupted(model, plan, draws, "decode")
    graph = model.graph
    clean_R, noisy_R = (tensor.flatten().to(model.device) for tensor in (clean_BL, noisy_BL))
    if graph.mask_id is not None:
        rows_M = (noisy_R == graph.mask_id).nonzero().squeeze(1)
    else:
        counted_R = within_spans(clean_BL, draws.span_B2).flatten()
        rows_M = counted_R.nonzero().squeeze(1).to(model.device)
    if not len(rows_M):
        return torch.zeros(len(clean_BL), 1, dtype=torch.float64), 0
    nats_R = torch.zeros(len(noisy_R), dtype=torch.float64, device=model.device)
    sigma_B = model.schedule.sigma(t_B)
    move = float(model.schedule.move_probability(t_B[:1]))
    rows_MW = model.rows(noisy_BL, sigma_B, rows_M, model.document_ends(clean_BL))
    row_bytes = 4 * graph.num_states
    size = rows_per_chunk(model.device, row_bytes=row_bytes, cpu_bytes=CPU_CHUNK_BYTES)
    finite = Finite()
    for start in range(0, len(rows_M), size):
        chunk = slice(start, start + size)
        logits_mV = model.logits_of(rows_MW[chunk])
        finite.note(logits_mV.sum(dim=1))
        weights_mN = logits_mV[:, : graph.num_tokens].double()
        if graph.mask_id is None:
            jump, stay = move / graph.num_tokens, 1.0 - move + move / graph.num_tokens
            own_m = noisy_R[rows_M[chunk]]
            if model.law.of_clean_token:
                weights_mN = mean_log_scores(weights_mN, own_m, sigma_B[:1].to(model.device))
            own_m1 = own_m[:, None]
            weights_mN = (weights_mN + math.log(jump)).scatter(1, own_m1, math.log(stay))
        target_m = weights_mN.gather(1, clean_R[rows_M[chunk]][:, None]).squeeze(1)
        nats_R[rows_M[chunk]] = torch.logsumexp(weights_mN, dim=1) - target_m
    finite.check()
    nats_B = nats_R.view(clean_BL.shape).sum(dim=1).cpu()
    return (nats_B * weight_B)[:, None], len(clean_BL)


def _corrupted(model: LogitModel, plan: Plan, draws: _Draws, purpose: str) -> tuple[Tensor, Tensor]:
    """Noisy tokens [B, L] and the weight of each draw [B], on the host."""
    clean_BL, graph = draws.clean_BL, model.graph
    length = clean_BL.shape[1]
    sigma_B = model.schedule.sigma(draws.t_B)
    moves, tokens, weights = [], [], []
    numbers = [part.tolist() for part in (draws.ids_B, draws.span_B2, draws.draw_B, sigma_B)]
    for block, (begin, end), draw, sigma in zip(*numbers, strict=True):
        move_L = plan.moves(purpose, length, block, draw)
        move_L[:begin] = move_L[end:] = 1.0  # what is given and padding never move
        weight = 1.0
        if plan.has_ends:
            choice = float(plan.uniforms(f"{purpose}/event", 1, block, draw)[0])
            draw_moves = moves_with_an_event if graph.mask_id is None else masks_by_their_number
            move_L[begin:end], weight = draw_moves(move_L[begin:end], choice, sigma)
        moves.append(move_L)
        weights.append(weight)
        if graph.mask_id is None:
            tokens.append(plan.uniforms(f"{purpose}/tokens", length, block, draw))
    noisy_BL = graph.corrupt(
        clean_BL.long(),
        sigma_B,
        torch.from_numpy(np.stack(moves)),
        torch.from_numpy(np.stack(tokens)) if tokens else None,
    )
    return noisy_BL, torch.tensor(weights, dtype=torch.float64)


def _combine(
    model: LogitModel, groups: Sequence[_GroupNats], span_n2: IntArray, plan: Plan, began: float
) -> BoundResult:
    """Nats of all blocks over tokens of text of all blocks, and their error, in float64."""
    text_n = span_n2[:, 1] - span_n2[:, 0]
    num_blocks, length = len(text_n), float(text_n.mean())
    share_n = text_n / length
    diffusion_nKC = np.concatenate([group.diffusion_gKC for group in groups])
    by_replicate = (num_blocks, plan.replicates, -1, diffusion_nKC.shape[2])
    values_nRC = diffusion_nKC.reshape(by_replicate).mean(axis=2) / length
    terms: dict[str, float | None] = {
        "diffusion": float(values_nRC[:, :, 0].mean(axis=1).mean()),
        "prior": None,
        "reconstruction": None,
    }
    if plan.has_ends:
        last = model.schedule.sigma(torch.ones((), dtype=torch.float64))
        prior = float(model.graph.prior_kl_per_token(last))
        decode_nR = np.concatenate([group.reconstruction_gR for group in groups]) / length
        terms["prior"] = prior
        terms["reconstruction"] = float(decode_nR.mean(axis=1).mean())
        values_nRC = values_nRC + (decode_nR + prior * share_n[:, None])[:, :, None]
    values_nR = values_nRC[:, :, 0]
    estimate = estimate_from_replicates(values_nR, share_n)
    normalised = None
    if values_nRC.shape[2] == 2:
        second = estimate_from_replicates(values_nRC[:, :, 1], share_n)
        normalised = OtherNats(second.mean, second.stderr)
    return BoundResult.of(
        estimate,
        text_n,
        began,
        terms=terms,
        draws=plan.draws,
        replicates=plan.replicates,
        network_calls=sum(group.network_calls for group in groups),
        protocol=plan.protocol,
        t_min=plan.t_min,
        block_nats_n=values_nR.mean(axis=1) / share_n,
        normalised=normalised,
    )
