"""Sampling from an autoregressive model: one position after the other, with a key-value cache.

What is given of a sample has to come first. Given positions go through the network together, each
further one alone: its keys and values are kept, so that L tokens cost L positions of the network
and not L * L.
"""

import numpy as np
import torch

from sedd_scale.arrays import BoolArray
from sedd_scale.diffusion.objectives import shifted
from sedd_scale.errors import DataError
from sedd_scale.sampling.batch_state import BatchState


def check_prefix(fixed_L: BoolArray) -> None:
    """Raise DataError where a position is given, true, after one that is not."""
    first = int(np.argmin(np.append(fixed_L, False)))
    if fixed_L[first:].any():
        given = first + int(np.argmax(fixed_L[first:]))
        raise DataError(
            f"position {given} is given after position {first}, which is free: an autoregressive "
            "model draws from left to right; give a prefix alone"
        )


def run_left_to_right(batch: BatchState) -> None:
    """Fill free positions from left to right, in place."""
    model = batch.model
    num, length = batch.state_BL.shape
    free_BL = batch.free_R.view(num, length)
    places = free_BL.any(dim=0).nonzero().flatten().tolist()
    uniform_BL = batch.draws.uniform("token", 0).view(num, length)
    sigma_B = torch.zeros(num, device=model.device)
    fed = 0
    with model.caching(length):
        for place in range(places[0], places[-1] + 1):
            shown_BL = shifted(batch.state_BL[:, : place + 1], model.graph)
            row_b = free_BL[:, place].nonzero().flatten()
            new = place + 1 - fed
            rows_bW = model.rows(shown_BL[:, fed:], sigma_B, row_b * new + new - 1)
            fed = place + 1
            logits_bV = model.logits_of(rows_bW)
            drawn_b = batch.law.draw(
                logits_bV[:, : model.graph.num_tokens], uniform_BL[row_b, place]
            )
            batch.state_BL[row_b, place] = drawn_b
            batch.report(place, 1.0 - (place + 1) / length)
