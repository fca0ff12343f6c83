"""From a prepared dataset to the micro-batches of this rank, a pure function of (seed, step).

Every rank of a model replica makes the same batch by itself; replicas make different parts of the
same global batch, whatever their number.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sedd_scale.arrays import BoolArray, IntArray
from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.data.joint_reader import JointReader, Shard
from sedd_scale.data.padding import counted_positions, shorten
from sedd_scale.data.shards import BadShardError
from sedd_scale.diffusion.corruption import Draw, NoisyBatch
from sedd_scale.diffusion.graphs import Graph
from sedd_scale.diffusion.process import process_of
from sedd_scale.engine.engine import MicroBatch
from sedd_scale.model.attention import document_ends, document_starts, packed_context
from sedd_scale.parallel.agreement import Agreement
from sedd_scale.parallel.layout import Layout
from sedd_scale.parallel.vocab import score_targets
from sedd_scale.tracking.metrics import TIME_KEYS

T = TypeVar("T")

# Sequences that are corrupted together, and validation blocks whose text is counted together.
CORRUPTED_TOGETHER = 64
COUNTED_TOGETHER = 64


class StepBatches(NamedTuple):
    """One step's data."""

    micro_batches: list[MicroBatch]
    """Of this rank."""
    tokens: int
    """Of text in the global batch: all its positions but padding and given first tokens."""


def micro_batch_of(
    noisy: NoisyBatch,
    graph: Graph,
    *,
    document_end: int | None,
    pin: bool,
    every_position: bool = False,
    counted_BL: BoolArray | None = None,
    mean_over: float | None = None,
    shift: bool = False,
    hidden: int | None = None,
) -> MicroBatch:
    """A corrupted batch as the network and its loss take it.

    Args:
        document_end: the token that ends a document, where attention stays within documents.
        pin: put it in page-locked memory, for a GPU's sake.
        every_position: every position has a loss, whatever it is shown (a causal network).
        counted_BL: the positions that are text; the others are padding, which stays as it is and
            has no part in the loss. None: all are text.
        mean_over: the number of positions that the loss is a mean over; None: all of the batch.
        shift: outputs are for the next position.
        hidden: how much attention does not see of what comes after, as `packed_context` takes it.
    """
    mask_BL = None
    if counted_BL is not None:
        mask_BL = torch.from_numpy(counted_BL)
        noisy = noisy._replace(noisy_BL=torch.where(mask_BL, noisy.noisy_BL, noisy.clean_BL))
    ends_BE = None if document_end is None else document_ends(noisy.clean_BL, document_end)
    targets = score_targets(
        graph,
        clean_BL=noisy.clean_BL,
        noisy_BL=noisy.noisy_BL,
        noise_B3=noisy.noise_B3,
        every_position=every_position,
        counted_BL=mask_BL,
        mean_over=mean_over,
        starts_BL=document_starts(noisy.clean_BL.shape, ends_BE) if shift else None,
    )
    context_BK = packed_context(noisy.dropout_key_B, ends_BE, hidden=hidden)
    batch = MicroBatch((noisy.noisy_BL, noisy.sigma_B.float(), context_BK), targets)
    return batch.pin_memory() if pin else batch


class _Batches:
    """What training and validation make their micro-batches with."""

    def __init__(self, corpus: Corpus, config: Config, layout: Layout) -> None:
        self.corpus, self.config = corpus, config
        self.layout = layout
        self.process = process_of(config, corpus.vocab_size)
        self.graph, self.objective = self.process.graph, self.process.objective
        self.document_end = corpus.eos_id if config.model.document_attention else None
        self._agreement = Agreement(layout, config.data.on_bad_shard)

    def _read_together(
        self,
        read: Callable[[], T],
        *,
        shard_of_error: Callable[[BadShardError], Shard],
        skip: Callable[[set[Shard]], None],
        note: str,
    ) -> T:
        """What `read` gives once it meets no damaged shard, on any rank; all skip those met.

        Args:
            note: what is said of a damaged one.
        """
        while True:
            bad: set[Shard] = set()
            found = None
            try:
                found = read()
            except BadShardError as error:
                if self.config.data.on_bad_shard == "stop":
                    raise
                bad.add(shard_of_error(error))
                print(f"rank {self.layout.rank}: {note}: {error}", file=sys.stderr, flush=True)
            bad = self._agreement.union(bad)
            if not bad:
                assert found is not None
                return found
            skip(bad)

    def _micro_batch_of(
        self,
        noisy: NoisyBatch,
        counted_BL: BoolArray | None,
        mean_over: float | None = None,
        hidden: int | None = None,
    ) -> MicroBatch:
        return micro_batch_of(
            noisy,
            self.graph,
            document_end=self.document_end,
            pin=self.layout.device.type == "cuda",
            every_position=self.objective.causal,
            counted_BL=counted_BL,
            mean_over=mean_over,
            shift=self.config.training.shift,
            hidden=hidden,
        )

    def _predicted(self, tokens_BL: IntArray) -> BoolArray:
        """Which positions of blocks are text that is predicted, bool [B, L]."""
        predicted_BL = text_positions(self.corpus, tokens_BL)
        if self.objective.first_is_given:
            ends_BE = None
            if self.document_end is not None:
                ends_BE = document_ends(torch.from_numpy(tokens_BL), self.document_end)
            predicted_BL &= ~document_starts(torch.Size(tokens_BL.shape), ends_BE).numpy()
        return predicted_BL


class TrainBatches(_Batches):
    """The training micro-batches of this rank.

    Where damaged shards are skipped, the ranks tell each other of them (see agreement), and every
    rank has to make every step.

    Args:
        corpus: the datasets.
        skipped: (dataset, shard, step from which it is skipped) of damaged shards.

    Attributes:
        loader: the order of the data, and the shards that are skipped.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: Config,
        layout: Layout,
        *,
        skipped: Sequence[Sequence[int]] = (),
    ) -> None:
        super().__init__(corpus, config, layout)
        self.loader = corpus.train_loader(config)
        for dataset, shard, step in skipped:
            self.loader.skip([(dataset, shard)], from_step=step)

    def of_step(self, step: int) -> StepBatches:
        """This rank's micro-batches of the step (counted from 0), corrupted.

        The loss of each is such that the mean over all micro-batches of the global batch is the sum
        over its text divided by the number of its tokens, however the batch is split.

        Raises:
            BadShardError: a shard is damaged and data.on_bad_shard=stop.
            DataError: a remote shard cannot be read, or all are damaged.
        """
        training = self.config.training
        per_rank = training.global_batch // self.layout.data
        first = self.layout.data_rank * per_rank
        mine = slice(first, first + per_rank)
        sample_ids = self.loader.sample_ids(step, np.arange(training.global_batch))
        first_is_given = self.objective.first_is_given
        varies = first_is_given and self.document_end is not None
        if (
            self.corpus.packing != "documents"
            and self.config.data.random_length == 0
            and not varies
        ):
            predicted = self.corpus.block_length - first_is_given
            counted_BL, tokens = None, training.global_batch * predicted
            tokens_BL = self._read(step, sample_ids[mine])
        else:
            # How much text the other replicas have decides what each token of it weighs.
            tokens_BL, counted_BL = self._text_of(step, sample_ids, self._read(step, sample_ids))
            tokens = int(counted_BL.sum())
            tokens_BL, counted_BL = tokens_BL[mine], counted_BL[mine]
        sample_ids = sample_ids[mine]
        noisy = self._corrupted(step, sample_ids, tokens_BL)
        micro_batches = []
        for begin in range(0, per_rank, training.micro_batch):
            part = slice(begin, begin + training.micro_batch)
            micro_batches.append(
                self._micro_batch_of(
                    noisy.part(part),
                    None if counted_BL is None else counted_BL[part],
                    mean_over=tokens * training.micro_batch / training.global_batch,
                    hidden=hidden_after(step, training.anneal_steps),
                )
            )
        return StepBatches(micro_batches, tokens)

    def metrics(self, num_samples: int) -> dict[str, float]:
        """Epochs of each dataset after the run's first samples, and shards skipped so far."""
        epochs = self.loader.epochs(num_samples)
        values = {"epoch": epochs[0]}
        if len(epochs) > 1:
            values = {f"epoch_{number}": epoch for number, epoch in enumerate(epochs)}
        if self.config.data.on_bad_shard == "skip":
            values["skipped_shards"] = float(len(self.loader.skipped))
        return values

    def _draw(self, step: int, sample_ids: IntArray) -> Draw:
        training = self.config.training
        return Draw(training.seed, step, sample_ids, global_batch=training.global_batch)

    def _read(self, step: int, sample_ids: IntArray) -> IntArray:
        """The samples' blocks; with the ranks' agreement on which shards to skip."""
        return self._read_together(
            lambda: self.loader.read_samples(sample_ids),
            shard_of_error=self.loader.joint.shard_of_error,
            skip=lambda bad: self.loader.skip(bad, from_step=step),
            note="skipping",
        )

    def _text_of(
        self, step: int, sample_ids: IntArray, tokens_BL: IntArray
    ) -> tuple[IntArray, BoolArray]:
        """The samples, some of them shortened, and which of their positions are text."""
        kept_BL: BoolArray | bool = True
        if self.config.data.random_length > 0:
            lengths_B = random_lengths(
                self._draw(step, sample_ids),
                block_length=self.corpus.block_length,
                share=self.config.data.random_length,
            )
            tokens_BL, kept_BL = shorten(tokens_BL, lengths_B, self.corpus.eos_id)
        return tokens_BL, self._predicted(tokens_BL) & kept_BL

    def _corrupted(self, step: int, sample_ids: IntArray, tokens_BL: IntArray) -> NoisyBatch:
        """Corrupt the samples in chunks whose temporaries fit in the CPU's cache."""
        draw = self._draw(step, sample_ids)
        t_B = self.process.times(draw)
        parts = []
        for begin in range(0, len(draw), CORRUPTED_TOGETHER):
            part = slice(begin, begin + CORRUPTED_TOGETHER)
            tokens_bL = torch.from_numpy(tokens_BL[part])
            parts.append(self.process.corrupt(tokens_bL, draw.part(part), t_B=t_B[part]))
        if len(parts) == 1:
            return parts[0]
        return NoisyBatch(*(torch.cat(values) for values in zip(*parts, strict=True)))


def hidden_after(step: int, anneal_steps: int) -> int | None:
    """Of 2^32 entries after a position, how many attention does not see in a step.

    All of them in step 0, as causal attention, then fewer in equal steps; None from `anneal_steps`
    on: it sees both sides.
    """
    return None if step >= anneal_steps else round(2**32 * (1 - step / anneal_steps))


def text_positions(corpus: Corpus, tokens_BL: IntArray) -> BoolArray:
    """Which positions of prepared blocks are text, bool [B, L]; only packing=documents pads."""
    if corpus.packing == "documents":
        return counted_positions(tokens_BL, corpus.eos_id)
    return np.ones(tokens_BL.shape, dtype=np.bool_)


def random_lengths(draw: Draw, *, block_length: int, share: float) -> IntArray:
    """Lengths in 1..L, int64 [B]: L for most samples, uniform for a share of them."""
    chosen_B, where_B = draw.uniforms(2, "length").T
    lengths_B = 1 + (where_B * block_length).astype(np.int64)
    return np.where(chosen_B < share, lengths_B, block_length)


class ValidationBatches(_Batches):
    """A fixed set of validation blocks with fixed noise, shared over the data-parallel ranks.

    The times of the blocks are stratified over the whole set. Every rank runs the same number of
    micro-batches; blocks that only fill up are dropped again by `bound`.

    Where damaged shards are skipped, other blocks replace theirs, the same on all ranks, and the
    bound is over slightly other text than before: `metrics` tells.

    Args:
        corpus: the datasets.

    Attributes:
        blocks: numbers of the blocks within the validation splits, laid end to end.
        tokens_n: of text in each block, without padding; float64.
        skipped: the damaged shards.

    Raises:
        BadShardError: a shard is damaged and data.on_bad_shard=stop.
        DataError: a remote shard cannot be read, or all are damaged.
    """

    def __init__(self, corpus: Corpus, config: Config, layout: Layout) -> None:
        super().__init__(corpus, config, layout)
        reader = corpus.valid_reader()
        self.skipped: set[Shard] = set()
        self._by_time: dict[str, float] = {}
        self.blocks, self.tokens_n = self._choose_blocks(reader)
        self._tenth_n = None if self.objective.causal else self._tenths()
        micro_batch = config.training.micro_batch
        unit = micro_batch * layout.data
        padded = np.resize(np.arange(len(self.blocks)), -(-len(self.blocks) // unit) * unit)
        mine = padded.reshape(layout.data, -1)[layout.data_rank]
        self.micro_batches = [
            self._micro_batch(reader, places) for places in mine.reshape(-1, micro_batch)
        ]

    def metrics(self) -> dict[str, float]:
        """The loss by noise level that `bound` found last, and damaged shards passed over.

        The first is nats per token of the blocks whose time lies in each tenth of [0, 1], nan where
        none does, under the names of `TIME_KEYS`; a causal network has no times.
        """
        if self.config.data.on_bad_shard == "stop":
            return dict(self._by_time)
        return {**self._by_time, "skipped_valid_shards": float(len(self.skipped))}

    def _tenths(self) -> Tensor:
        """In which tenth of [0, 1] the time of each block lies."""
        times_n = self.objective.on_grid(
            self.process.times(self._draw(np.arange(len(self.blocks))))
        )
        return (times_n * len(TIME_KEYS)).long().clamp(max=len(TIME_KEYS) - 1)

    def _loss_by_time(self, nats_n: Tensor) -> dict[str, float]:
        tenth_n = self._tenth_n
        if tenth_n is None:
            return {}
        sums, tokens = (
            torch.zeros(len(TIME_KEYS), dtype=torch.float64).index_add(0, tenth_n, values_n)
            for values_n in (nats_n.double(), self.tokens_n)
        )
        return dict(zip(TIME_KEYS, (sums / tokens).tolist(), strict=True))

    def _choose_blocks(self, reader: JointReader) -> tuple[IntArray, Tensor]:
        """The blocks, all of them readable, and the text tokens of each; identical on all ranks."""

        def read() -> tuple[IntArray, Tensor]:
            blocks = reader.spread(self.config.training.valid_blocks, without=self.skipped)
            counts: list[int] = []
            for begin in range(0, len(blocks), COUNTED_TOGETHER):
                tokens_BL = reader.read(blocks[begin : begin + COUNTED_TOGETHER])
                counts += self._predicted(tokens_BL).sum(axis=1).tolist()
            return blocks, torch.tensor(counts, dtype=torch.float64)

        return self._read_together(
            read,
            shard_of_error=reader.shard_of_error,
            skip=self.skipped.update,
            note="other blocks validate",
        )

    def _draw(self, places: IntArray) -> Draw:
        seed = self.config.training.seed
        return Draw(seed, 0, places, global_batch=len(self.blocks), stream="validation")

    def _micro_batch(self, reader: JointReader, places: IntArray) -> MicroBatch:
        tokens_BL = reader.read(self.blocks[places])
        noisy = self.process.corrupt(torch.from_numpy(tokens_BL), self._draw(places))
        return self._micro_batch_of(noisy, text_positions(self.corpus, tokens_BL))

    def bound(self, nats_of_ranks: Sequence[Tensor]) -> tuple[float, float]:
        """Bound on the negative log-likelihood and its standard error, nats per token.

        Args:
            nats_of_ranks: the loss of each sequence in nats, rank after rank.

        The integral over [t_min, 1] by one stratified time a block, plus the terminal term, plus
        decoding at t_min without the network (Lou et al., the bound of section 3); of other
        objectives what their `closing` says. The error is over blocks; strata make the true one
        smaller.
        """
        mean_tokens = self.tokens_n.mean()
        nats_n = torch.cat(list(nats_of_ranks))[: len(self.blocks)]
        self._by_time = self._loss_by_time(nats_n)
        nats_n = nats_n / mean_tokens
        # Of blocks with more text more nats are expected: only the rest is error.
        rest_n = nats_n - nats_n.mean() * self.tokens_n / mean_tokens
        width, closing = self.process.closing()
        error = float(rest_n.std() / len(nats_n) ** 0.5) if len(nats_n) > 1 else float("nan")
        return float(width * nats_n.mean() + closing), width * error
