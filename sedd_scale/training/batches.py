"""From a prepared dataset to the micro-batches of this rank, a pure function of (seed, step).

Every rank of a model replica makes the same batch by itself; replicas make different parts of the
same global batch, whatever their number.
"""

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus, JointReader
from sedd_scale.data.loader import Shard, spread_blocks
from sedd_scale.data.padding import counted_positions, shorten
from sedd_scale.data.shards import BadShardError
from sedd_scale.diffusion.corruption import NoisyBatch, corrupt_batch, keyed_uniforms
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.schedules import Schedule
from sedd_scale.model.attention import documents_of
from sedd_scale.model.network import context_of
from sedd_scale.parallel.engine import MicroBatch
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import score_targets

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def micro_batch_of(
    noisy: NoisyBatch,
    graph: Graph,
    *,
    document_end: int | None,
    pin: bool,
    counted_BL: BoolArray | None = None,
) -> MicroBatch:
    """A corrupted batch as the network and its loss take it.

    Args:
        counted_BL: the positions that are text; the others are padding, which stays as it is and
            has no part in the loss, whose mean is still over all positions. None: all are text.
        document_end: the token that ends a document, where attention stays within documents.
        pin: put it in page-locked memory, for a GPU's sake.
    """
    mask_BL = None
    if counted_BL is not None:
        mask_BL = torch.from_numpy(counted_BL)
        noisy = noisy._replace(noisy_BL=torch.where(mask_BL, noisy.noisy_BL, noisy.clean_BL))
    targets = score_targets(
        graph,
        clean_BL=noisy.clean_BL,
        noisy_BL=noisy.noisy_BL,
        noise_B3=torch.stack([noisy.sigma_B, noisy.rate_B, noisy.rate_over_expm1_B], dim=1),
        counted_BL=mask_BL,
    )
    documents_BL = None if document_end is None else documents_of(noisy.clean_BL, document_end)
    context_BK = context_of(noisy.dropout_key_B, documents_BL)
    batch = MicroBatch((noisy.noisy_BL, noisy.sigma_B.float(), context_BK), targets)
    return batch.pin_memory() if pin else batch


class TrainBatches:
    """The training micro-batches of this rank.

    Where damaged shards are skipped, the ranks tell each other of them in a process group of their
    own, so that this may run in a background thread; every rank has to make every step.

    Args:
        corpus: the datasets.

    Attributes:
        loader: the order of the data, and the shards that are skipped.
    """

    def __init__(
        self, corpus: Corpus, config: Config, graph: Graph, schedule: Schedule, layout: Layout
    ) -> None:
        self.config, self.graph, self.schedule, self.layout = config, graph, schedule, layout
        self.corpus = corpus
        self.document_end = corpus.eos_id if config.model.document_attention else None
        self.loader = corpus.train_loader(config)
        self._group: dist.ProcessGroup | None = None
        if config.data.on_bad_shard == "skip" and layout.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def of_step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step (counted from 0), corrupted.

        Raises:
            BadShardError: a shard is damaged and data.on_bad_shard=stop.
            DataError: a remote shard cannot be read, or all are damaged.
        """
        training = self.config.training
        per_rank = training.global_batch // self.layout.data
        first = self.layout.data_rank * per_rank
        sample_ids = self.loader.sample_ids(step, np.arange(first, first + per_rank))
        tokens_BL = self._read(step, sample_ids)
        return [
            self._micro_batch(step, sample_ids[begin:end], tokens_BL[begin:end])
            for begin, end in (
                (begin, begin + training.micro_batch)
                for begin in range(0, per_rank, training.micro_batch)
            )
        ]

    def metrics(self, num_samples: int) -> dict[str, float]:
        """Epochs of each dataset after the run's first samples, and shards skipped so far."""
        epochs = self.loader.epochs(num_samples)
        values = {"epoch": epochs[0]}
        if len(epochs) > 1:
            values = {f"epoch_{number}": epoch for number, epoch in enumerate(epochs)}
        if self.config.data.on_bad_shard == "skip":
            values["skipped_shards"] = float(len(self.loader.skipped))
        return values

    def _read(self, step: int, sample_ids: IntArray) -> IntArray:
        """The samples' blocks; with the ranks' agreement on which shards to skip."""
        while True:
            bad: set[Shard] = set()
            tokens_BL = np.empty((0, self.corpus.block_length), dtype=np.int64)
            try:
                tokens_BL = self.loader.read_samples(sample_ids)
            except BadShardError as error:
                if self.config.data.on_bad_shard == "stop":
                    raise
                bad.add(self.loader.shard_of_error(error))
                print(f"rank {self.layout.rank}: skipping: {error}", file=sys.stderr, flush=True)
            bad = self._union(bad)
            if not bad:
                return tokens_BL
            self.loader.skip(bad, from_step=step)

    def _union(self, bad: set[Shard]) -> set[Shard]:
        """The damaged shards that any rank found, on every rank."""
        if self._group is None:
            return bad
        found = torch.tensor([len(bad)])
        dist.all_reduce(found, group=self._group)
        if not found.item():
            return set()
        parts: list[set[Shard]] = [set() for _ in range(self.layout.world_size)]
        dist.all_gather_object(parts, bad, group=self._group)
        return set().union(*parts)

    def _micro_batch(self, step: int, sample_ids: IntArray, tokens_BL: IntArray) -> MicroBatch:
        training = self.config.training
        counted_BL = counted_of(self.corpus.packing, tokens_BL, self.corpus.eos_id)
        if self.config.data.random_length > 0:
            lengths_B = random_lengths(
                sample_ids,
                step=step,
                seed=training.seed,
                block_length=self.corpus.block_length,
                share=self.config.data.random_length,
            )
            tokens_BL, kept_BL = shorten(tokens_BL, lengths_B, self.corpus.eos_id)
            counted_BL = kept_BL if counted_BL is None else counted_BL & kept_BL
        noisy = corrupt_batch(
            torch.from_numpy(tokens_BL),
            sample_ids_B=sample_ids,
            step=step,
            seed=training.seed,
            global_batch=training.global_batch,
            graph=self.graph,
            schedule=self.schedule,
            t_min=self.config.noise.t_min,
        )
        return micro_batch_of(
            noisy,
            self.graph,
            document_end=self.document_end,
            counted_BL=counted_BL,
            pin=self.layout.device.type == "cuda",
        )


def counted_of(packing: str, tokens_BL: IntArray, eos_id: int) -> BoolArray | None:
    """The positions of prepared blocks that are text; None: all of them."""
    return counted_positions(tokens_BL, eos_id) if packing == "documents" else None


def random_lengths(
    sample_ids_B: IntArray, *, step: int, seed: int, block_length: int, share: float
) -> IntArray:
    """Lengths in 1..L, int64 [B]: L for most samples, uniform for a share of them."""
    lengths = []
    for sample in sample_ids_B.tolist():
        chosen, where = keyed_uniforms(
            2, seed=seed, stream="train/length", step=step, sample=sample
        ).tolist()
        lengths.append(1 + int(where * block_length) if chosen < share else block_length)
    return np.array(lengths, dtype=np.int64)


class ValidationBatches:
    """A fixed set of validation blocks with fixed noise, shared over the data-parallel ranks.

    The times of the blocks are stratified over the whole set. Every rank runs the same number of
    micro-batches; blocks that only fill up are dropped again by `bound`.

    Args:
        corpus: the datasets.
    """

    def __init__(
        self, corpus: Corpus, config: Config, graph: Graph, schedule: Schedule, layout: Layout
    ) -> None:
        reader = corpus.valid_reader()
        self.corpus = corpus
        self.graph, self.schedule, self.layout = graph, schedule, layout
        self.t_min = config.noise.t_min
        self.document_end = corpus.eos_id if config.model.document_attention else None
        self.blocks = spread_blocks(len(reader), config.training.valid_blocks)
        self.tokens_n = self._tokens_of_blocks(reader)
        micro_batch = config.training.micro_batch
        unit = micro_batch * layout.data
        padded = np.resize(np.arange(len(self.blocks)), -(-len(self.blocks) // unit) * unit)
        mine = padded.reshape(layout.data, -1)[layout.data_rank]
        self.micro_batches = [
            self._micro_batch(reader, places, config.training.seed)
            for places in mine.reshape(-1, micro_batch)
        ]

    def _tokens_of_blocks(self, reader: JointReader) -> Tensor:
        """The text tokens of each validation block, padding left out; float64."""
        full = torch.full((len(self.blocks),), self.corpus.block_length, dtype=torch.float64)
        if self.corpus.packing != "documents":
            return full
        counts = [
            counted_positions(reader.read([block]), self.corpus.eos_id).sum()
            for block in self.blocks.tolist()
        ]
        return torch.tensor(counts, dtype=torch.float64)

    def _micro_batch(self, reader: JointReader, places: IntArray, seed: int) -> MicroBatch:
        tokens_BL = reader.read(self.blocks[places])
        noisy = corrupt_batch(
            torch.from_numpy(tokens_BL),
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
            counted_BL=counted_of(self.corpus.packing, tokens_BL, self.corpus.eos_id),
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
        mean_tokens = self.tokens_n.mean()
        nats_n = torch.cat(list(nats_of_ranks))[: len(self.blocks)] / mean_tokens
        # Of blocks with more text more nats are expected: only the rest is error.
        rest_n = nats_n - nats_n.mean() * self.tokens_n / mean_tokens
        ends = torch.tensor([1.0, self.t_min], dtype=torch.float64)
        sigma_end, sigma_start = self.schedule.sigma(ends)
        closing = self.graph.prior_kl_per_token(sigma_end)
        closing = closing + self.graph.decoding_cost_per_token(sigma_start)
        width = 1.0 - self.t_min
        error = float(rest_n.std() / len(nats_n) ** 0.5) if len(nats_n) > 1 else float("nan")
        return float(width * nats_n.mean() + closing), width * error
