"""Head outputs at chosen positions, a chunk of rows at a time, so that [B, L, V] never exists."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.diffusion.schedules import Schedule
from sedd_scale.errors import CheckpointError
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling.chunks import rows_per_chunk

CPU_CHUNK_BYTES = 16 * 2**20


class LogitModel(Protocol):
    """What sampling needs of a model; `ScoreModel` is one, an exact score table may be another.

    Attributes:
        graph: the forward process.
        schedule: the noise schedule.
        law: what a row of logits means.
        time_conditioned: whether logits depend on sigma.
        device: where its tensors live.
    """

    graph: Graph
    schedule: Schedule
    law: RowLaw

    @property
    def time_conditioned(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def logits(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor,
        rows_M: Tensor,
        ends_BE: Tensor | None = None,
    ) -> Tensor:
        """[M, V] at the positions `rows_M` of the flattened [B * L]; as `ScoreModel.logits`."""
        ...


def logit_chunks(
    model: LogitModel,
    tokens_BL: Tensor,
    sigma_B: Tensor,
    rows_M: Tensor,
    *,
    ends_BE: Tensor | None = None,
    chunk_bytes: int = CPU_CHUNK_BYTES,
) -> Iterator[tuple[slice, Tensor]]:
    """One network call, then (slice of `rows_M`, logits [m, V]) chunk by chunk.

    Args:
        tokens_BL: noisy tokens.
        sigma_B: total noise of each sequence, nats.
        rows_M: positions of the flattened [B * L]; none: no network call is made.
        ends_BE: where each sequence's documents end, for attention within documents.
        chunk_bytes: memory for a chunk of logits on a CPU, counted in float32.

    Raises:
        CheckpointError: an output is not a finite number.
    """
    if not len(rows_M):
        return
    row_bytes = 4 * model.graph.num_states
    step = rows_per_chunk(model.device, row_bytes=row_bytes, cpu_bytes=chunk_bytes)
    chunks = [slice(start, start + step) for start in range(0, len(rows_M), step)]
    if isinstance(model, ScoreModel):
        hidden_MH = model.network.hidden_of_rows(tokens_BL, sigma_B, rows_M, ends_BE)
        for chunk in chunks:
            yield chunk, _finite(model.network.head.logits(hidden_MH[chunk]))
    else:
        logits_MV = _finite(model.logits(tokens_BL, sigma_B, rows_M))
        for chunk in chunks:
            yield chunk, logits_MV[chunk]


def _finite(logits: Tensor) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise CheckpointError(
            "the network's outputs are not finite: its weights are damaged or its training "
            "diverged; use another checkpoint"
        )
    return logits
