"""A chunk of logits of the clean token's law, over vocabulary shards: losses and their gradient.

The mean parametrisation of the uniform graph; `diffusion.score_entropy` has the formulas. Three
passes over the chunk: for e^(z - max), for sums over w, and for the gradient. Six numbers a row
cross tensor ranks, in three reductions.

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
from sedd_scale.parallel.score_kernel import (
    LawCoefficients,
    RowColumns,
    chunk_gradient,
    chunk_law,
    chunk_statistics,
    entries,
)
from sedd_scale.parallel.vocab_shard import VocabShard


def mean_chunk_loss(
    logits_mW: Tensor,
    clean_m: Tensor,
    noisy_m: Tensor,
    noise_m3: Tensor,
    shard: VocabShard,
    weight_m: Tensor | None,
    bias_W: Tensor | None,
    gradient_mW: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Per-row losses of one chunk, and with `weight_m` the gradient of sum(weight * loss).

    Arguments and results are those of `vocab._chunk_loss`.
    """
    noise = RowNoise(*noise_m3.unbind(1))
    own = shard.column_of(noisy_m)
    columns = RowColumns(shard.column_of(clean_m), own)
    own_z_m = entries(logits_mW, own, missing=-torch.inf)
    if bias_W is not None:
        own_z_m = own_z_m + bias_W[own.clamp_min(0)]
    chunk = chunk_statistics(logits_mW, columns, bias_W)
    own_z_m = own_z_m.to(chunk.max.dtype)
    max_m = shard.reduce(torch.maximum(chunk.max, own_z_m), dist.ReduceOp.MAX)
    target_m = torch.where(columns.target >= 0, (chunk.target - max_m).exp(), 0.0)
    rescale_m = (chunk.max - max_m).exp()
    parts = torch.stack([(own_z_m - max_m).exp(), target_m, chunk.sum_exp * rescale_m])
    own_m, target_m, others_m = shard.reduce(parts)
    odds_m = clean_odds(noise.sigma, shard.law.graph.num_tokens).to(max_m.dtype)
    factor_m = odds_m / (own_m + others_m)
    chunk, *totals_m = chunk_law(chunk, columns, factor_m * rescale_m)
    log_total_m, share_total_m = shard.reduce(torch.stack(totals_m))
    row = mean_row_loss(
        MeanStatistics(
            own=factor_m * own_m,
            target=factor_m * target_m,
            others=factor_m * others_m,
            log_total=log_total_m,
            share_total=share_total_m,
        ),
        noise,
        num_tokens=shard.law.graph.num_tokens,
        unchanged_M=clean_m == noisy_m,
    )
    if weight_m is None:
        return row.loss, None
    coefficients = LawCoefficients(
        w=row.grad_w * weight_m,
        share=row.grad_share * weight_m,
        target=row.grad_target * weight_m,
        own=row.grad_own * weight_m,
    )
    return row.loss, chunk_gradient(chunk, columns, coefficients, gradient_mW)
