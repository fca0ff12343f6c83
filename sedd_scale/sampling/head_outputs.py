"""Logits at chosen positions of a batch that changes little by little from step to step.

The network runs only for sequences whose input is new, the head's product is made only for the
rows asked for, a chunk at a time: [B, L, V] never exists.

B sequences, L positions, V states, W numbers kept of a position: the head's input, or all of its
outputs where the model is a table.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling.logits import LogitModel

CHUNK_BYTES = 48 * 2**20
_SMALLEST_CHUNK_ROWS = 16


class HeadOutputs:
    """The network's outputs for the present state of a batch.

    Attributes:
        calls: how often the network ran.
        sequences: how many sequences went through it in all.
        rows: head products made, in rows.
    """

    def __init__(
        self,
        model: LogitModel,
        shape: torch.Size,
        *,
        documents_BL: Tensor | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.model = model
        self.documents_BL = documents_BL
        self.calls = self.sequences = self.rows = 0
        self.chunk_rows = max(_SMALLEST_CHUNK_ROWS, chunk_bytes // (4 * model.graph.num_states))
        self._tokens_BL = torch.full(shape, -1, dtype=torch.int64, device=model.device)
        self._sigma_B = torch.full(shape[:1], -1.0, dtype=torch.float64, device=model.device)
        self._kept_BLW: Tensor | None = None

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
        assert self._kept_BLW is not None
        kept_RW = self._kept_BLW.flatten(0, 1)
        num_chunks = -(-len(rows_M) // self.chunk_rows)
        size = -(-len(rows_M) // num_chunks)  # even chunks: a small rest is a slow product
        self.rows += len(rows_M)
        for start in range(0, len(rows_M), size):
            chunk = slice(start, start + size)
            logits_mV = kept_RW.index_select(0, rows_M[chunk])
            if isinstance(self.model, ScoreModel):
                logits_mV = self.model.network.head.logits(logits_mV)
            yield chunk, logits_mV[:, : self.model.graph.num_tokens]

    def _run(self, state_BL: Tensor, sigma_B: Tensor, rows_M: Tensor) -> None:
        """Run the network for the stale ones among the sequences of `rows_M`."""
        batch, length = state_BL.shape
        wanted_B = torch.zeros(batch, dtype=torch.bool, device=state_BL.device)
        wanted_B[rows_M // length] = True
        which_b = (wanted_B & self.stale(state_BL, sigma_B)).nonzero().squeeze(1)
        if not len(which_b):
            return
        self.calls += 1
        self.sequences += len(which_b)
        documents_bL = None if self.documents_BL is None else self.documents_BL[which_b]
        outputs_bLW = self._outputs(state_BL[which_b], sigma_B[which_b], documents_bL)
        if len(which_b) == batch:
            self._kept_BLW = outputs_bLW
        else:
            if self._kept_BLW is None:
                self._kept_BLW = outputs_bLW.new_empty(batch, *outputs_bLW.shape[1:])
            self._kept_BLW[which_b] = outputs_bLW
        self._tokens_BL[which_b] = state_BL[which_b]
        self._sigma_B[which_b] = sigma_B[which_b]

    def _outputs(self, tokens_bL: Tensor, sigma_b: Tensor, documents_bL: Tensor | None) -> Tensor:
        if isinstance(self.model, ScoreModel):
            hidden_LbH = self.model.network.hidden(tokens_bL, sigma_b, documents_bL)
            return hidden_LbH.transpose(0, 1).contiguous()
        every_row = torch.arange(tokens_bL.numel(), device=tokens_bL.device)
        logits = self.model.logits(tokens_bL, sigma_b, every_row, documents_bL)
        return logits.view(*tokens_bL.shape, -1)


def row_log_sum(logits_MN: Tensor) -> Tensor:
    """Float64 logsumexp of each row [M], its terms added in the rows' own precision."""
    max_M = logits_MN.amax(dim=1)
    sum_M = (logits_MN - max_M[:, None]).exp_().sum(dim=1)
    return max_M.double() + torch.log(sum_M.double())
