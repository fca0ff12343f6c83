"""The free offset of logits, folded into the head's bias once, before a run's first step.

Cross-entropy leaves a constant of each row of logits open, and scores have none: those of a masked
position sum to 1 / (e^sigma - 1). With u the logarithm of that sum times (e^sigma - 1),

    scaled:    u = lse(z) - ln N
    unscaled:  u = lse(z) + ln(e^sigma - 1)

score entropy has the penalty e^u - 1 - u, and u of an autoregressive model is tens of nats. The
mean of u is taken off every bias of the head. What a row's own u differs by from it is left.
"""

import torch
import torch.distributed as dist

from sedd_scale.diffusion.row_law import LogTotal, law_of
from sedd_scale.engine.engine import Engine
from sedd_scale.interop.initial_weights import BIAS
from sedd_scale.training.batches import TrainBatches


@torch.no_grad()
def calibrate_head(engine: Engine, batches: TrainBatches) -> float:
    """Make the mean of u over the masked positions of the first step's batch 0.

    It is the global batch that step 1 trains on, with its noise and its attention, so it is the
    same under every layout. Collective over all processes.

    Returns:
        What was added to every bias of masters and averages, in nats.
    """
    law = law_of(batches.config, batches.graph, cross_entropy=False)
    micro_batches = batches.of_step(0).micro_batches
    totals_B = engine.evaluate(micro_batches, law=LogTotal(law))
    rows = sum(len(batch.targets.rows_M) for batch in micro_batches)
    sums = torch.tensor([float(totals_B.sum()), rows], dtype=torch.float64)
    sums = sums.to(engine.layout.device)
    dist.all_reduce(sums, group=engine.layout.data_group)
    added = -float(sums[0] / sums[1].clamp(min=1))
    for logical in engine.parameters:
        if logical.name != BIAS:
            continue
        for key in ("master", "ema"):
            fragment = engine.fragments.get(logical, key)
            if fragment is not None:
                fragment.flat.add_(added)
    engine.fragments.refresh_parameters()
    return added
