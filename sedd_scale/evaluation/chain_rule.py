"""Likelihoods by the chain rule: left to right, and in random orders.

An autoregressive model's is exact: the sum over positions of -log p(x_i | x_<i). A masked model
whose outputs do not depend on time is an any-order autoregressive model (arXiv 2406.03736, section
3.3): run backwards exactly it fills positions in a uniformly random order, so that

    p(x) = E over orders pi of  product over i of  p(x_pi(i) | x_pi(<i)).

The mean over orders of the path's nats is its bound, with no prior, no t_min and no integral; minus
the log of the mean of K paths' probabilities estimates the likelihood itself, from above, and the
closer the more orders.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedd_scale.arrays import FloatArray, IntArray
from sedd_scale.diffusion.corruption import keyed_uniforms
from sedd_scale.diffusion.row_law import CrossEntropy
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.evaluation.result import ANY_ORDER, EXACT, BoundResult, OtherNats
from sedd_scale.evaluation.standard_error import (
    Estimate,
    error_over_blocks,
    estimate_from_replicates,
)
from sedd_scale.model.logit_model import LogitModel

GIVEN = "first tokens of text given, not predicted (training.shift)"

Deal = Callable[[int, Callable[[int], tuple[Any, ...]]], list[tuple[Any, ...]]]


@torch.no_grad()
def evaluate_left_to_right(
    model: LogitModel,
    blocks_nL: Tensor,
    *,
    batch_size: int,
    span_n2: IntArray,
    deal: Deal,
) -> BoundResult:
    """The exact likelihood of blocks under an autoregressive model; collective.

    With `training.shift` it is that given each document's first token, which is not counted.

    Arguments and what is raised are those of `evaluate_bound`, but for span_n2: where the counted
    text of each block begins and ends; and for deal: `over_ranks` of the model's layout.
    """
    began = time.perf_counter()
    groups = _slices(len(blocks_nL), batch_size)

    def counted(which: int) -> Tensor:
        """The positions of a group that are predicted."""
        clean_BL = blocks_nL[groups[which]]
        counted_BL = within_spans(clean_BL, span_n2[groups[which]])
        starts_BL = model.starts(clean_BL)
        return counted_BL if starts_BL is None else counted_BL & ~starts_BL

    text_n = np.concatenate([counted(which).sum(dim=1) for which in range(len(groups))])
    given = int((span_n2[:, 1] - span_n2[:, 0]).sum() - text_n.sum())
    if not text_n.any():
        raise DataError(
            "nothing is predicted: with training.shift=true a document's first token is given; "
            "give longer text"
        )

    def nats(which: int) -> tuple[FloatArray]:
        clean_BL, counted_BL = blocks_nL[groups[which]], counted(which)
        noise_B3 = _weight_one(len(clean_BL))
        shown_BL = model.objective.shown(clean_BL.long(), model.graph)
        nats_B1 = model.losses(
            clean_BL, shown_BL, noise_B3, counted_BL, laws=[CrossEntropy(model.graph)]
        )
        return (_finite(nats_B1[:, 0]),)

    found = deal(len(groups), nats)
    nats_n = np.concatenate([part for (part,) in found])
    mean = float(nats_n.sum() / text_n.sum())
    error = error_over_blocks((nats_n - mean * text_n) / text_n.mean())
    return BoundResult.of(
        Estimate(mean, 0.0, error, (mean, mean)),
        text_n,
        began,
        network_calls=len(nats_n),
        protocol="chain-rule",
        block_nats_n=nats_n / np.maximum(text_n, 1),
        kind=EXACT,
        notes={GIVEN: given} if given else {},
    )


@torch.no_grad()
def evaluate_any_order(
    model: LogitModel,
    blocks_nL: Tensor,
    *,
    orders: int,
    seed: int,
    batch_size: int,
    ids_n: Sequence[int] | IntArray,
    span_n2: IntArray,
    deal: Deal,
) -> BoundResult:
    """Bound and likelihood of blocks from random orders of their positions; collective.

    Each order costs one network call per token. Other arguments are those above.

    Raises:
        ConfigError: the model has no masks, or its outputs depend on time, or fewer than 2 orders.
    """
    began = time.perf_counter()
    text_n = span_n2[:, 1] - span_n2[:, 0]
    mask_id = model.graph.mask_id
    if mask_id is None or model.time_conditioned:
        raise ConfigError(
            "protocol any-order needs a model of graph absorb without time conditioning "
            "(model.time_conditioning=false): choose protocol low-variance"
        )
    if orders < 2:
        raise ConfigError(
            f"{orders} orders per block leave no way to tell a standard error: give at least 2"
        )

    def nats(which: int) -> tuple[FloatArray]:
        """Of the block's paths [K], each the sum of its steps."""
        begin, end = span_n2[which].tolist()
        text, block_id = end - begin, int(ids_n[which])
        order_KT = np.stack([_order(text, seed, block_id, number) for number in range(orders)])
        steps = [(number, place) for number in range(orders) for place in range(text)]
        nats_K = np.zeros(orders)
        for part in _slices(len(steps), batch_size):
            numbers, places = np.array(steps[part]).T
            rank_BL = torch.full((len(numbers), blocks_nL.shape[1]), -1)
            rank_BL[:, begin:end] = torch.from_numpy(order_KT[numbers].argsort(axis=1))
            place_B1 = torch.from_numpy(places)[:, None]
            clean_BL = blocks_nL[which].long().expand(len(numbers), -1)
            noisy_BL = torch.where(rank_BL >= place_B1, mask_id, clean_BL)
            found_B1 = model.losses(
                clean_BL,
                noisy_BL,
                _weight_one(len(numbers)),
                rank_BL == place_B1,
                laws=[CrossEntropy(model.graph)],
            )
            np.add.at(nats_K, numbers, _finite(found_B1[:, 0]))
        return (nats_K,)

    found = deal(len(blocks_nL), nats)
    nats_nK = np.stack([part for (part,) in found])
    length = float(text_n.mean())
    estimate = estimate_from_replicates(nats_nK / length, text_n / length)
    smallest_n1 = nats_nK.min(axis=1, keepdims=True)
    ratio_nK = np.exp(smallest_n1 - nats_nK)
    likelihood_n = smallest_n1[:, 0] - np.log(ratio_nK.mean(axis=1))
    # The error of a logarithm is that of its argument, relatively.
    relative_n = ratio_nK.std(axis=1, ddof=1) / ratio_nK.mean(axis=1) / orders**0.5
    likelihood = OtherNats(
        float(likelihood_n.mean() / length),
        float(np.sqrt((relative_n**2).sum()) / len(relative_n) / length),
    )
    return BoundResult.of(
        estimate,
        text_n,
        began,
        draws=orders,
        replicates=orders,
        network_calls=orders * int(text_n.sum()),
        protocol="any-order",
        block_nats_n=nats_nK.mean(axis=1) / text_n,
        kind=ANY_ORDER,
        likelihood=likelihood,
    )


def within_spans(blocks_BL: Tensor, span_B2: IntArray) -> Tensor:
    """Which positions lie between begin and end of their block's text, bool [B, L]."""
    begin_B1, end_B1 = torch.from_numpy(span_B2)[:, :, None].unbind(1)
    place_L = torch.arange(blocks_BL.shape[1])
    return (place_L >= begin_B1) & (place_L < end_B1)


def _order(length: int, seed: int, block_id: int, number: int) -> IntArray:
    uniform = keyed_uniforms(length, seed=seed, stream="bound/order", step=number, sample=block_id)
    return np.argsort(uniform, kind="stable")


def _slices(count: int, size: int) -> list[slice]:
    return [slice(at, at + size) for at in range(0, count, size)]


def _weight_one(batch: int) -> Tensor:
    columns = torch.zeros(batch, 3, dtype=torch.float64)
    columns[:, 2] = 1.0
    return columns


def _finite(nats_B: Tensor) -> FloatArray:
    if not bool(torch.isfinite(nats_B).all()):
        raise CheckpointError(
            "a likelihood is not finite: the checkpoint's weights are damaged or its training "
            "diverged; use another checkpoint"
        )
    return nats_B.double().cpu().numpy()
