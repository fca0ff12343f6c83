"""The columns of the vocabulary that one tensor-parallel rank holds, and which loss they serve."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.diffusion.graphs import Graph
from sedd_scale.planning.activations import GPU_CHUNK_BYTES, MIN_CHUNK_ROWS

# For one chunk of logits. On a GPU larger products pay, and so does passing less often over the
# weight's gradient.
CHUNK_BYTES = {"cpu": 44 * 2**20, "cuda": GPU_CHUNK_BYTES}


@dataclass(frozen=True)
class VocabShard:
    """The columns of the head that this rank holds.

    Attributes:
        graph: the forward process.
        scaled: whether logits are log-scores up to the known shift of sigma (absorb only).
        start: token id of the first column.
        length: columns that are real tokens; mask and padding come after and take no part.
        group: the tensor-parallel processes, or None for one process.
        chunk_bytes: memory for one chunk of logits, in bytes; None for what suits the device.
        cross_entropy: the loss is cross-entropy times the third column of the noise.
        mean: logits are those of the clean token's law, of which the scores follow (uniform only).
    """

    graph: Graph
    scaled: bool
    start: int
    length: int
    group: dist.ProcessGroup | None
    chunk_bytes: int | None = None
    cross_entropy: bool = False
    mean: bool = False

    def chunk_rows(self, num_columns: int, device_type: str = "cpu") -> int:
        """Rows whose float32 logits over `num_columns` fit in the memory for a chunk.

        Takes the padded number of columns, equal on all tensor ranks, so that all cut the rows into
        the same chunks and their reductions match.
        """
        budget = self.chunk_bytes or CHUNK_BYTES[device_type]
        copies = 2 if self.mean and not self.cross_entropy else 1
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
