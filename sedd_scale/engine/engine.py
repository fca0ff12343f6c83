"""One training step under any layout: DeepSpeed's engines behind one small interface.

Without pipeline stages a `DeepSpeedEngine` (ZeRO 1, 2, 3) runs the whole network; with them a
`PipelineEngine` (ZeRO 1) runs the list of layers in stages. Both take the same micro-batches, made
on the host, and give the same losses and gradient norms.
"""

import contextlib
import dataclasses
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

from sedd_scale.config import Config
from sedd_scale.diffusion.objectives import make_objective
from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.engine.diagnosis import explain_failure
from sedd_scale.engine.fragments import ZeroFragments
from sedd_scale.engine.gathers import WeightGathers, exchange_buckets
from sedd_scale.engine.stages import PipelineStage
from sedd_scale.engine.update_gate import StepNumbers, StepResult, UpdateGate
from sedd_scale.engine.zero import GatheringZero, zero_of
from sedd_scale.model.head import ScoreLinear
from sedd_scale.model.network import LayerBuilder, ScoreNetwork
from sedd_scale.model.parameters import LogicalParameter, logical_parameters
from sedd_scale.parallel.layout import Layout, ModelParallelUnit
from sedd_scale.parallel.vocab import ScoreTargets
from sedd_scale.planning.model_states import REDUCE_BUCKET


class OptimizerFactory(Protocol):
    """Makes an optimizer of parameters, in groups that `cut` makes of those of one rule."""

    def __call__(
        self,
        parameters: Sequence[LogicalParameter],
        cut: Callable[[list[nn.Parameter]], list[list[nn.Parameter]]],
        /,
    ) -> torch.optim.Optimizer: ...


class MicroBatch(NamedTuple):
    """One forward pass of one rank, on the host: (noisy_BL, sigma_B, context) and the targets."""

    inputs: tuple[Tensor, Tensor, Tensor]
    targets: ScoreTargets

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch on `device`."""
        noisy, sigma, context = (tensor.to(device, non_blocking=True) for tensor in self.inputs)
        return MicroBatch((noisy, sigma, context), self.targets.to(device))

    def pin_memory(self) -> "MicroBatch":
        """The same batch in page-locked memory, from where copies to a GPU do not wait."""
        noisy, sigma, context = (tensor.pin_memory() for tensor in self.inputs)
        targets = ScoreTargets(*(tensor.pin_memory() for tensor in self.targets))
        return MicroBatch((noisy, sigma, context), targets)


class Engine(ABC):
    """A network with its optimizer under one layout.

    Attributes:
        layout: where this process stands.
        parameters: this process's parameters under their logical names.
        fragments: this process's ZeRO fragments of masters, moments and averages.
    """

    def __init__(
        self,
        network: "ScoreNetwork | PipelineStage",
        layout: Layout,
        config: Config,
        make_optimizer: OptimizerFactory,
        *,
        mpu: ModelParallelUnit | None = None,
    ) -> None:
        self.layout = layout
        # Under ZeRO 2 in float32 each rank would keep whole gradients at the edges of every bucket.
        stages = (1, 2) if config.training.precision == "bf16" else (1,)
        travels = layout.data > 1 and config.parallel.zero_stage in stages
        self.parameters = list(logical_parameters(network, layout))
        cut = exchange_buckets if travels else lambda weights: [weights]
        self._optimizer = make_optimizer(self.parameters, cut)
        self._deepspeed: Any
        self._deepspeed, *_ = deepspeed.initialize(
            model=network,
            optimizer=self._optimizer,
            config=_deepspeed_config(config, layout),
            mpu=mpu,
        )
        zero = zero_of(self._deepspeed, layout)
        zero.send_less()
        gathers = None
        if travels:
            assert isinstance(zero, GatheringZero)
            gathers = WeightGathers(zero, network.stack)
        self._gate = UpdateGate(zero, clip=config.optimizer.clip, loss_part=self._loss_part)
        self.fragments = ZeroFragments(zero, self.parameters, gathers)
        zero.adam.connect(self.fragments)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        lr: float,
        accept: Callable[[StepNumbers], bool] | None = None,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Accumulate the gradient over this rank's micro-batches and update the weights.

        Where a number is not finite, or `accept` says no, weights, moments and averages stay as
        they are and only the optimizer's count of steps advances.

        Args:
            accept: judges the step's numbers on the host before the weights change, alike on all
                ranks; the host then waits for them in the middle of the step.
            wants_stop: whether this rank wants to stop; asked once, and all ranks get to know.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._gate.accept = accept
        self._gate.wants_stop = wants_stop
        self._deepspeed.train()
        self._accumulate_and_step(micro_batches)
        return self._gate.outcome()

    def loss_of_replica(self) -> float | None:
        """Mean loss of this rank's micro-batches in the step made last, nats per token.

        None on ranks that do not count it: of earlier stages, and tensor ranks other than 0.
        """
        if not self.layout.counts_loss:
            return None
        return float(self._gate.loss_part()) * self.layout.data

    def explain(self, micro_batches: Sequence[MicroBatch]) -> str:
        """Which rank, stage and weight or layer made the step of these micro-batches not finite.

        Collective: every rank calls it after that step, and gets the same.
        """
        return explain_failure(
            self._deepspeed.module,
            self.fragments,
            lambda: self.evaluate(micro_batches),
            loss_was_finite=math.isfinite(self._gate.outcome().numbers.loss),
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], law: RowLaw | None = None) -> Tensor:
        """Score entropy of each sequence of this rank's micro-batches, on the CPU, float64 nats.

        Args:
            law: what to sum over rows, if other than the loss that the network is trained with.
        """
        modules = self._deepspeed.module.modules()
        heads = [module for module in modules if isinstance(module, ScoreLinear)]
        shards = [head.shard for head in heads]
        if law is not None:
            for head in heads:
                head.shard = dataclasses.replace(head.shard, law=law)
        self._deepspeed.eval()
        losses = self._per_sequence_losses(micro_batches).double().cpu()
        self._deepspeed.train()
        for head, shard in zip(heads, shards):
            head.shard = shard
        return losses

    @abstractmethod
    def _accumulate_and_step(self, micro_batches: Sequence[MicroBatch]) -> None: ...

    @abstractmethod
    def _loss_part(self) -> Tensor: ...

    @abstractmethod
    def _per_sequence_losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor: ...


class WholeNetworkEngine(Engine):
    """Tensor and data parallelism with ZeRO 1, 2 or 3; no pipeline stages."""

    def __init__(
        self,
        builders: list[LayerBuilder],
        layout: Layout,
        config: Config,
        make_optimizer: OptimizerFactory,
    ) -> None:
        network = ScoreNetwork(builders)
        super().__init__(network, layout, config, make_optimizer, mpu=ModelParallelUnit())
        _assert_same_group(self._deepspeed.data_parallel_group, layout.data_group)
        self._loss = torch.zeros((), device=layout.device)

    def _accumulate_and_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        self._loss = torch.zeros((), dtype=torch.float32, device=self.layout.device)
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.layout.device)
            loss = self._deepspeed(on_device.inputs, on_device.targets)
            if self.layout.counts_loss:
                self._loss += loss.detach() / (len(micro_batches) * self.layout.data)
            self._deepspeed.backward(loss)
            self._deepspeed.step()

    def _loss_part(self) -> Tensor:
        return self._loss

    def _per_sequence_losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        losses = []
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.layout.device)
            losses.append(self._deepspeed(on_device.inputs, on_device.targets, per_sequence=True))
        return torch.cat(losses)


class PipelineStageEngine(Engine):
    """Tensor, data and pipeline parallelism with ZeRO 1."""

    def __init__(
        self,
        builders: list[LayerBuilder],
        layout: Layout,
        config: Config,
        make_optimizer: OptimizerFactory,
    ) -> None:
        causal = make_objective(config).causal
        wide = config.model.document_attention or config.training.anneal_steps > 0
        self._module = module = PipelineStage(
            builders, config.model, layout, causal=causal, wide=wide
        )
        super().__init__(module, layout, config, make_optimizer)
        # A pair of events a step, kept for ever, and a mean loss that nobody reads, for which the
        # host would wait and all ranks meet.
        self._deepspeed.timers = NoopTimer()
        self._deepspeed._aggregate_total_loss = lambda: None
        assert module.grid.get_slice_parallel_rank() == layout.tensor_rank
        assert module.stage_id == layout.pipeline_rank
        _assert_same_group(module.grid.get_data_parallel_group(), layout.data_group)

    def _accumulate_and_step(self, micro_batches: Sequence[MicroBatch]) -> None:
        self._deepspeed.train_batch(self._for_stages(micro_batches))

    def _for_stages(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Any, Any]]:
        """What this stage takes, on its device already: DeepSpeed's own copies would wait."""
        device, layout = self.layout.device, self.layout
        inputs = self._module.padded([batch.inputs for batch in micro_batches])
        for part, batch in zip(inputs, micro_batches):
            given: tuple[Tensor, ...] = part
            if layout.is_first_stage:
                given = tuple(tensor.to(device, non_blocking=True) for tensor in part)
            targets = batch.targets.to(device) if layout.is_last_stage else batch.targets
            yield given, tuple(targets)

    def _loss_part(self) -> Tensor:
        if not self.layout.counts_loss:
            return torch.zeros((), device=self.layout.device)
        total: Tensor = self._deepspeed.total_loss
        return total / (self._deepspeed.micro_batches * self.layout.data)

    def _per_sequence_losses(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        # DeepSpeed adds what it finds here to the losses of sequences.
        self._deepspeed.total_loss = None
        outputs = self._deepspeed.eval_batch(
            self._for_stages(micro_batches),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=len(micro_batches),
        )
        num_sequences = sum(len(batch.inputs[1]) for batch in micro_batches)
        losses = torch.zeros(num_sequences, dtype=torch.float32, device=self.layout.device)
        if self.layout.is_last_stage:
            losses.copy_(torch.cat(outputs))
        source = self._module.grid.stage_to_global(self.layout.pipeline - 1)
        dist.broadcast(losses, source, group=self._module.grid.get_pipe_parallel_group())
        return losses


def make_engine(
    builders: list[LayerBuilder],
    layout: Layout,
    config: Config,
    make_optimizer: OptimizerFactory,
) -> Engine:
    """Build this process's layers and put them in the engine its layout asks for.

    Args:
        builders: the whole network, a builder a layer.
        make_optimizer: makes the optimizer of the parameters.
    """
    _start_deepspeed()
    engine = PipelineStageEngine if layout.pipeline > 1 else WholeNetworkEngine
    with contextlib.redirect_stdout(None):  # it prints its memory at every stage of its start
        return engine(builders, layout, config, make_optimizer)


def _deepspeed_config(config: Config, layout: Layout) -> dict[str, Any]:
    training = config.training
    return {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": config.accumulation(layout.world_size),
        "gradient_clipping": 0.0,  # folded into the update, by the gate
        "zero_optimization": _zero_config(config, layout),
        "zero_allow_untested_optimizer": True,
        # The loss writes the head's gradient during the forward pass. DeepSpeed's backward pass
        # clears gradients that are not yet in float32, so accumulate each one immediately.
        "bf16": {"enabled": training.precision == "bf16", "immediate_grad_update": True},
        # Without this bf16 gradients accumulate in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        # Stage boundaries carry (hidden, conditioning, keys): only whole tensors can travel so.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 2**62,
        # It would wait for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def _zero_config(config: Config, layout: Layout) -> dict[str, Any]:
    return {
        "stage": config.parallel.zero_stage,
        # A bucket is reduced to the ranks that own its parts: half of an all-reduce's bytes.
        "use_multi_rank_bucket_allreduce": False,
        # Reduce gradients during the backward pass; small buckets let the first reduction start
        # early. Useless in a pipeline, where the backward passes wait for other stages.
        "overlap_comm": layout.data > 1 and layout.pipeline == 1,
        "reduce_bucket_size": REDUCE_BUCKET,
        # Copied next to each other only if they are to travel together.
        "contiguous_gradients": layout.data > 1 or config.parallel.zero_stage == 3,
    }


def _assert_same_group(ours: Any, theirs: Any) -> None:
    assert dist.get_process_group_ranks(ours) == dist.get_process_group_ranks(theirs), (
        "Megatron-core and DeepSpeed disagree on who shares data-parallel work"
    )


def _start_deepspeed() -> None:
    """Let DeepSpeed adopt our process groups, without its banner lines."""
    os.environ.setdefault("LOCAL_RANK", "0")
    logger.setLevel(logging.ERROR)
    # DeepSpeed would compile this extension on first use, in every process at once; it serves its
    # inference engine only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
