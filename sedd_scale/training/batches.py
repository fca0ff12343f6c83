"""From a prepared dataset to the micro-batches of this rank, a pure function of (seed, step).

Every rank of a model replica makes the same batch by itself; replicas make different parts of the
same global batch, whatever their number.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.data.loader import TrainLoader, spread_blocks
from sedd_scale.data.shards import BlockReader
from sedd_scale.diffusion.corruption import NoisyBatch, corrupt_batch
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.schedules import Schedule
from sedd_scale.model.attention import documents_of
from sedd_scale.model.network import context_of
from sedd_scale.parallel.engine import MicroBatch
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import score_targets

IntArray = npt.NDArray[np.int64]


def micro_batch_of(
    noisy: NoisyBatch, graph: Graph, *, document_end: int | None, pin: bool
) -> MicroBatch:
    """A corrupted batch as the network and its loss take it.

    Args:
        document_end: the token that ends a document, where attention stays within documents.
        pin: put it in page-locked memory, for a GPU's sake.
    """
    targets = score_targets(
        graph,
        clean_BL=noisy.clean_BL,
        noisy_BL=noisy.noisy_BL,
        noise_B3=torch.stack([noisy.sigma_B, noisy.rate_B, noisy.rate_over_expm1_B], dim=1),
    )
    documents_BL = None if document_end is None else documents_of(noisy.clean_BL, document_end)
    context_BK = context_of(noisy.dropout_key_B, documents_BL)
    batch = MicroBatch((noisy.noisy_BL, noisy.sigma_B.float(), context_BK), targets)
    return batch.pin_memory() if pin else batch


def document_end(config: Config, reader: BlockReader) -> int | None:
    """The token that ends a document, or None where attention reads whole blocks."""
    return reader.dataset.eos_id if config.model.document_attention else None


class TrainBatches:
    """The training micro-batches of this rank.

    Args:
        reader: the training split.
    """

    def __init__(
        self, reader: BlockReader, config: Config, graph: Graph, schedule: Schedule, layout: Layout
    ) -> None:
        self.config, self.graph, self.schedule, self.layout = config, graph, schedule, layout
        self.document_end = document_end(config, reader)
        training = config.training
        self.loader = TrainLoader(reader, seed=training.seed, global_batch=training.global_batch)

    def of_step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step (counted from 0), corrupted."""
        training = self.config.training
        per_rank = training.global_batch // self.layout.data
        first = self.layout.data_rank * per_rank
        return [
            self._micro_batch(step, np.arange(start, start + training.micro_batch))
            for start in range(first, first + per_rank, training.micro_batch)
        ]

    def _micro_batch(self, step: int, positions: IntArray) -> MicroBatch:
        sample_ids = self.loader.sample_ids(step, positions)
        noisy = corrupt_batch(
            torch.from_numpy(self.loader.read_samples(sample_ids)),
            sample_ids_B=sample_ids,
            step=step,
            seed=self.config.training.seed,
            global_batch=self.config.training.global_batch,
            graph=self.graph,
            schedule=self.schedule,
            t_min=self.config.noise.t_min,
        )
        return micro_batch_of(
            noisy,
            self.graph,
            document_end=self.document_end,
            pin=self.layout.device.type == "cuda",
        )


class ValidationBatches:
    """A fixed set of validation blocks with fixed noise, shared over the data-parallel ranks.

    The times of the blocks are stratified over the whole set. Every rank runs the same number of
    micro-batches; blocks that only fill up are dropped again by `bound`.

    Args:
        reader: the validation split.
    """

    def __init__(
        self, reader: BlockReader, config: Config, graph: Graph, schedule: Schedule, layout: Layout
    ) -> None:
        self.graph, self.schedule, self.layout = graph, schedule, layout
        self.t_min = config.noise.t_min
        self.document_end = document_end(config, reader)
        self.block_length = reader.block_length
        self.blocks = spread_blocks(len(reader), config.training.valid_blocks)
        micro_batch = config.training.micro_batch
        unit = micro_batch * layout.data
        padded = np.resize(np.arange(len(self.blocks)), -(-len(self.blocks) // unit) * unit)
        mine = padded.reshape(layout.data, -1)[layout.data_rank]
        self.micro_batches = [
            self._micro_batch(reader, places, config.training.seed)
            for places in mine.reshape(-1, micro_batch)
        ]

    def _micro_batch(self, reader: BlockReader, places: IntArray, seed: int) -> MicroBatch:
        noisy = corrupt_batch(
            torch.from_numpy(reader.read(self.blocks[places])),
            sample_ids_B=places,
            step=0,
            seed=seed,
            global_batch=len(self.blocks),
            graph=self.graph,
            schedule=self.schedule,
            t_min=self.t_min,
            stream="validation",
        )
        return micro_batch_of(
            noisy,
            self.graph,
            document_end=self.document_end,
            pin=self.layout.device.type == "cuda",
        )

    def bound(self, nats_of_ranks: Sequence[Tensor]) -> tuple[float, float]:
        """Bound on the negative log-likelihood and its standard error, nats per token.

        Args:
            nats_of_ranks: score entropy of each sequence in nats, rank after rank.

        The integral over [t_min, 1] by one stratified time a block, plus the terminal term, plus
        decoding at t_min without the network (Lou et al., the bound of section 3). The error is
        over blocks; strata make the true one smaller.
        """
        nats_n = torch.cat(list(nats_of_ranks))[: len(self.blocks)] / self.block_length
        ends = torch.tensor([1.0, self.t_min], dtype=torch.float64)
        sigma_end, sigma_start = self.schedule.sigma(ends)
        closing = self.graph.prior_kl_per_token(sigma_end)
        closing = closing + self.graph.decoding_cost_per_token(sigma_start)
        width = 1.0 - self.t_min
        error = float(nats_n.std() / len(nats_n) ** 0.5) if len(nats_n) > 1 else float("nan")
        return float(width * nats_n.mean() + closing), width * error
