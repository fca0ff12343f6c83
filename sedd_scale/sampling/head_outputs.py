"""Logits at chosen positions of a batch that changes little by little from step to step.

The network runs only for sequences whose input is new, the head's product is made only for the
rows asked for, a chunk at a time: [B, L, V] never exists.

B sequences, L positions, V states, N tokens, W numbers kept of a position (see `LogitModel`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_scale.model.logit_model import LogitModel
from sedd_scale.sampling.chunks import rows_per_chunk

CPU_CHUNK_BYTES = 48 * 2**20


class HeadOutputs:
    """The network's outputs for the present state of a batch.

    Attributes:
        calls: how often the network ran.
    """

    def __init__(
        self,
        model: LogitModel,
        shape: torch.Size,
        *,
        ends_BE: Tensor | None = None,
        chunk_bytes: int = CPU_CHUNK_BYTES,
    ) -> None:
        self.model = model
        self.ends_BE = ends_BE
        self.calls = 0
        self.chunk_rows = rows_per_chunk(
            model.device, row_bytes=4 * model.graph.num_states, cpu_bytes=chunk_bytes
        )
        self._tokens_BL = torch.full(shape, -1, dtype=torch.int64, device=model.device)
        self._sigma_B = torch.full(shape[:1], -1.0, dtype=torch.float64, device=model.device)
        self._kept_RW: Tensor | None = None
        self._is_kept_R = torch.zeros(shape.numel(), dtype=torch.bool, device=model.device)

    def stale(self, state_BL: Tensor, sigma_B: Tensor) -> Tensor:
        """Bool [B]: sequences whose input is not that of their last run.

        Without time conditioning another sigma is the same input.
        """
        stale_B = (self._tokens_BL != state_BL).any(dim=1)
        if self.model.time_conditioned:
            stale_B |= self._sigma_B != sigma_B
        return stale_B

    def chunks(
        self, state_BL: Tensor, sigma_B: Tensor, rows_M: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """(slice of `rows_M`, logits of its tokens [m, N]), chunk by chunk.

        Args:
            state_BL: noisy tokens, on the model's device.
            sigma_B: total noise of each sequence in nats, float64.
            rows_M: positions of the flattened [B * L]; none: the network does not run.
        """
        if not len(rows_M):
            return
        self._run(state_BL, sigma_B, rows_M)
        assert self._kept_RW is not None
        num_chunks = -(-len(rows_M) // self.chunk_rows)
        size = -(-len(rows_M) // num_chunks)  # even chunks: a small rest is a slow product
        for start in range(0, len(rows_M), size):
            chunk = slice(start, start + size)
            logits_mV = self.model.logits_of(self._kept_RW.index_select(0, rows_M[chunk]))
            yield chunk, logits_mV[:, : self.model.graph.num_tokens]

    def _run(self, state_BL: Tensor, sigma_B: Tensor, rows_M: Tensor) -> None:
        """Run the network for those sequences of `rows_M` whose outputs there are not kept."""
        batch, length = state_BL.shape
        sequence_M = rows_M // length
        lacking_B = torch.zeros(batch, dtype=torch.bool, device=state_BL.device)
        lacking_B[sequence_M[~self._is_kept_R[rows_M]]] = True
        wanted_B = torch.zeros_like(lacking_B)
        wanted_B[sequence_M] = True
        run_B = wanted_B & (lacking_B | self.stale(state_BL, sigma_B))
        which_b = run_B.nonzero().squeeze(1)
        if not len(which_b):
            return
        self.calls += 1
        run_M = run_B[sequence_M]
        rows_n = rows_M[run_M]
        place_b = torch.cumsum(run_B, dim=0) - 1
        within_n = place_b[sequence_M[run_M]] * length + rows_n % length
        ends_bE = None if self.ends_BE is None else self.ends_BE[which_b]
        rows_nW = self.model.rows(state_BL[which_b], sigma_B[which_b], within_n, ends_bE)
        self._is_kept_R.view(batch, length)[which_b] = False
        self._is_kept_R[rows_n] = True
        self._keep(rows_n, rows_nW)
        self._tokens_BL[which_b] = state_BL[which_b]
        self._sigma_B[which_b] = sigma_B[which_b]

    def _keep(self, rows_M: Tensor, rows_MW: Tensor) -> None:
        if self._kept_RW is None:
            self._kept_RW = rows_MW.new_empty(len(self._is_kept_R), rows_MW.shape[1])
        self._kept_RW[rows_M] = rows_MW


class CausalOutputs(HeadOutputs):
    """Of a causal model within its `caching`: every position goes through the network once.

    The rows of a call are at one position, behind those of the call before. Where nothing stands
    before the first token, a position's row is that of the token before it.
    """

    _fed = 0

    def _run(self, state_BL: Tensor, sigma_B: Tensor, rows_M: Tensor) -> None:
        length, objective = state_BL.shape[1], self.model.objective
        fed, self._fed = self._fed, int(rows_M[0]) % length + (not objective.first_is_given)
        self.calls += 1
        shown_BL = objective.shown(state_BL[:, : self._fed], self.model.graph)
        within_M = (rows_M // length + 1) * (self._fed - fed) - 1
        self._keep(rows_M, self.model.rows(shown_BL[:, fed:], sigma_B, within_M))


def row_log_sum(logits_MN: Tensor) -> Tensor:
    """Float64 logsumexp of each row [M], its terms added in the rows' own precision."""
    max_M = logits_MN.amax(dim=1)
    sum_M = (logits_MN - max_M[:, None]).exp_().sum(dim=1)
    return max_M.double() + torch.log(sum_M.double())
