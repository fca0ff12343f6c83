"""A chunk of logits of the clean token's law, over vocabulary shards: losses and their gradient.

The mean parametrisation of the uniform graph; `diffusion.score_entropy` has the formulas. The chunk
is overwritten three times, by e^(z - max), by w and by the gradient; six numbers a row cross
tensor ranks, in three reductions.

m rows of a chunk, W columns of this rank's vocabulary shard.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.diffusion.score_entropy import (
    MeanStatistics,
    RowNoise,
    clean_odds,
    mean_row_loss,
)
from sedd_scale.parallel.score_kernel import set_entries
from sedd_scale.parallel.vocab_shard import VocabShard


def mean_chunk_loss(
    logits_mW: Tensor,
    clean_m: Tensor,
    noisy_m: Tensor,
    noise_m3: Tensor,
    shard: VocabShard,
    weight_m: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Per-row losses of one chunk, and with `weight_m` the gradient of sum(weight * loss) [m, W].

    The logits may be overwritten.
    """
    noise = RowNoise(*noise_m3.unbind(1))
    own, target = shard.column_of(noisy_m), shard.column_of(clean_m)
    table_mW = logits_mW if logits_mW.dtype == torch.float64 else logits_mW.float()
    lowest = torch.finfo(table_mW.dtype).min
    max_m = torch.full_like(noise.sigma, lowest, dtype=table_mW.dtype)
    if table_mW.shape[1]:
        max_m = table_mW.amax(1).clamp_min(lowest)
    max_m = shard.reduce(max_m, dist.ReduceOp.MAX)
    table_mW.sub_(max_m[:, None]).exp_()
    own_m, target_m = _entries(table_mW, own), _entries(table_mW, target)
    set_entries(table_mW, own, 0.0)
    own_m, target_m, others_m = shard.reduce(torch.stack([own_m, target_m, table_mW.sum(1)]))
    odds_m = clean_odds(noise.sigma, shard.graph.num_tokens).to(table_mW.dtype)
    factor_m = odds_m / (own_m + others_m)
    table_mW.mul_(factor_m[:, None])
    passing_mW = table_mW.log1p()
    log_total_m = passing_mW.sum(1)
    share_total_m = passing_mW.neg_().expm1_().sum(1).neg_()
    del passing_mW
    log_total_m, share_total_m = shard.reduce(torch.stack([log_total_m, share_total_m]))
    statistics = MeanStatistics(
        own=factor_m * own_m,
        target=factor_m * target_m,
        others=factor_m * others_m,
        log_total=log_total_m,
        share_total=share_total_m,
    )
    row = mean_row_loss(
        statistics,
        noise,
        num_tokens=shard.graph.num_tokens,
        unchanged_M=clean_m == noisy_m,
    )
    if weight_m is None:
        return row.loss, None
    grad_w_m1, grad_share_m1 = ((part * weight_m)[:, None] for part in (row.grad_w, row.grad_share))
    slope_mW = table_mW.add(1.0)
    torch.addcdiv(grad_w_m1, grad_share_m1, slope_mW, value=-1.0, out=slope_mW)
    table_mW.mul_(slope_mW)
    at_target_m = _entries(table_mW, target) + row.grad_target * weight_m
    set_entries(table_mW, target, at_target_m)
    set_entries(table_mW, own, row.grad_own * weight_m)
    return row.loss, table_mW


def _entries(table_mW: Tensor, column_m: Tensor) -> Tensor:
    """Each row's entry at its column, 0 where another rank holds it."""
    if not table_mW.shape[1]:
        return table_mW.sum(1)
    entry_m = table_mW.gather(1, column_m.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(column_m >= 0, entry_m, 0.0)
