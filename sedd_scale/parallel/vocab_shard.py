"""The columns of the vocabulary that one tensor-parallel rank holds, and which loss they serve."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.planning.activations import GPU_CHUNK_BYTES, MIN_CHUNK_ROWS

# For one chunk of logits. On a GPU larger products pay, and so does passing less often over the
# weight's gradient.
CHUNK_BYTES = {"cpu": 44 * 2**20, "cuda": GPU_CHUNK_BYTES}


@dataclass(frozen=True)
class VocabShard:
    """The columns of the head that this rank holds.

    Attributes:
        law: what a row of logits means.
        start: token id of the first column.
        length: columns that are real tokens; mask and padding come after and take no part.
        group: the tensor-parallel processes, or None for one process.
        rows_twice: whether two targets may have the same row of hidden states.
        chunk_bytes: memory for one chunk of logits, in bytes; None for what suits the device.
    """

    law: RowLaw
    start: int
    length: int
    group: dist.ProcessGroup | None
    rows_twice: bool = False
    chunk_bytes: int | None = None

    def chunk_rows(self, num_columns: int, device_type: str = "cpu") -> int:
        """Rows whose float32 logits over `num_columns` fit in the memory for a chunk.

        Takes the padded number of columns, equal on all tensor ranks, so that all cut the rows into
        the same chunks and their reductions match.
        """
        budget = self.chunk_bytes or CHUNK_BYTES[device_type]
        copies = 2 if self.law.of_clean_token else 1
        return max(MIN_CHUNK_ROWS, budget // (4 * copies * num_columns))

    def reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce over the tensor-parallel ranks, in place."""
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor

    def column_of(self, token_m: Tensor) -> Tensor:
        """Where each row's token lies in the shard, -1 where another rank holds it."""
        local_m = token_m - self.start
        return torch.where((local_m >= 0) & (local_m < self.length), local_m, -1)
