"""What a configuration needs under one layout, and how few GPUs each legal layout can do with."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from sedd_scale.config import Config, ParallelConfig
from sedd_scale.errors import ConfigError
from sedd_scale.planning.activations import stage_activations
from sedd_scale.planning.flops import StepFlops, step_flops
from sedd_scale.planning.model_states import BYTES, StateBytes, state_bytes, update_rule
from sedd_scale.planning.parameters import count_by_part, layer_shapes, stage_bounds

ASSUMPTIONS = (
    "DeepSpeed 0.19's buffers and no memory lost to fragmentation",
    "attention never materialises scores (flash-attn, or PyTorch's fused SDPA)",
    "the worst case under absorb: every position masked",
    "pipelines run 1F1B: stage s of S holds min(S - s, micro-batches) at one time",
    "ZeRO 3 gathers up to its max_live_parameters of whole weights",
    "FLOPs of matrix products only; masked positions at their expected number",
)

# Tensor-parallel groups stay within a node; no more stages than this are tried.
MOST = {"tensor": 8, "pipeline": 16}


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of one pipeline stage (the whole network without a pipeline).

    Attributes:
        layers: how many layers of the list embedding, blocks, head the stage has.
        parameters: numbers of its tensor-parallel shards, padding included, before ZeRO.
        states: weights, gradients, optimizer and DeepSpeed's buffers.
        activations: kept for the backward pass by all micro-batches in flight.
        boundary: received from and sent to neighbouring stages.
        workspace: the most that lives beside the activations.
    """

    layers: int
    parameters: int
    states: StateBytes
    activations: int
    boundary: int
    workspace: int

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step: in the last backward pass, or in the update."""
        states = self.states
        resident = states.weights + states.gradients + states.optimizer
        computing = states.buckets + states.gathered + self.activations + self.workspace
        return resident + self.boundary + max(computing, states.buckets + states.update)


@dataclass(frozen=True)
class Plan:
    """What one step of a configuration needs on `gpus` GPUs; bytes, FLOPs and numbers.

    Attributes:
        gpus: processes in all, one a GPU.
        data: model replicas.
        accumulation: micro-batches of one rank in one step.
        parameters: of the whole network by part, without padding.
        stages: one entry a pipeline stage; ranks of one stage differ in padding only.
        flops: of one step over all GPUs.
        sent_bytes: estimate of what one rank of the busiest stage sends in one step.
    """

    gpus: int
    data: int
    accumulation: int
    parallel: ParallelConfig
    parameters: dict[str, int]
    stages: tuple[StageMemory, ...]
    flops: StepFlops
    sent_bytes: int

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(self.parameters.values())

    @property
    def heaviest(self) -> StageMemory:
        """The stage whose ranks need the most memory."""
        return max(self.stages, key=lambda stage: stage.peak)


@dataclass(frozen=True)
class LayoutFit:
    """One layout and the smallest number of GPUs on which it fits.

    Attributes:
        plan: the plan on that number of GPUs, or None where no number suffices.
        least_bytes: the heaviest rank's peak on the most GPUs that the batch can be shared by.
    """

    parallel: ParallelConfig
    plan: Plan | None
    least_bytes: int


def plan(config: Config, world_size: int, *, vocab_size: int, block_length: int) -> Plan:
    """Predict memory and arithmetic of a configuration on `world_size` GPUs.

    Args:
        vocab_size: N, the number of real tokens.
        block_length: L.

    Raises:
        ConfigError: the configuration cannot run on that number of processes.
    """
    config = _resolved(config, vocab_size, block_length)
    config.validate(world_size)
    parallel, training = config.parallel, config.training
    data, accumulation = config.data_parallel(world_size), config.accumulation(world_size)
    layers = layer_shapes(config, vocab_size)
    bounds = stage_bounds(len(layers), parallel.pipeline)
    stages = []
    for stage, (first, end) in enumerate(itertools.pairwise(bounds)):
        held = [parameter for layer in layers[first:end] for parameter in layer]
        if config.model.tied_embedding and first > 0 and end == len(layers):
            held.append(layers[0][0])  # a copy, for the head
        numels = [parameter.local_numel(parallel.tensor) for parameter in held]
        rules = [update_rule(config.optimizer.name, parameter.name) for parameter in held]
        kept = sum(len(rule.state_keys) * numel for rule, numel in zip(rules, numels))
        activations = stage_activations(
            config,
            vocab_size=vocab_size,
            block_length=block_length,
            stage=stage,
            layers=range(first, end),
            in_flight=min(parallel.pipeline - stage, accumulation),
        )
        stages.append(
            StageMemory(
                layers=end - first,
                parameters=sum(numels),
                states=state_bytes(
                    numels,
                    precision=training.precision,
                    zero_stage=parallel.zero_stage,
                    data=data,
                    pipeline=parallel.pipeline,
                    kept=kept / sum(numels),
                ),
                activations=activations.kept,
                boundary=activations.boundary,
                workspace=activations.workspace,
            )
        )
    return Plan(
        gpus=world_size,
        data=data,
        accumulation=accumulation,
        parallel=parallel,
        parameters=count_by_part(layers),
        stages=tuple(stages),
        flops=step_flops(config, vocab_size=vocab_size, block_length=block_length),
        sent_bytes=_sent_bytes(config, stages, data, accumulation, block_length),
    )


def fit_layouts(
    config: Config, *, vocab_size: int, block_length: int, usable_bytes: float
) -> list[LayoutFit]:
    """Every legal layout with the fewest GPUs of `usable_bytes` that it needs, best first.

    The batch, the micro-batch and the model stay as configured. Fewest GPUs come first, then the
    least recomputation, then the least communication, then the least memory; layouts that fit on no
    number of GPUs come last.
    """
    fits = [
        smallest_fit(
            dataclasses.replace(config, parallel=parallel),
            vocab_size=vocab_size,
            block_length=block_length,
            usable_bytes=usable_bytes,
        )
        for parallel in legal_layouts(config, vocab_size=vocab_size, block_length=block_length)
    ]

    def rank(fit: LayoutFit) -> tuple[float, ...]:
        if fit.plan is None:
            return (float("inf"), fit.least_bytes)
        return (
            fit.plan.gpus,
            fit.plan.flops.recompute,
            bool(fit.parallel.recompute_every),
            fit.plan.sent_bytes,
            fit.plan.heaviest.peak,
        )

    return sorted(fits, key=rank)


def smallest_fit(
    config: Config, *, vocab_size: int, block_length: int, usable_bytes: float
) -> LayoutFit:
    """The configured layout on the smallest number of GPUs that holds it.

    Raises:
        ConfigError: the configuration cannot run on any number.
    """
    config = _resolved(config, vocab_size, block_length)
    parallel, training = config.parallel, config.training
    least = 0
    for data in _divisors(training.global_batch // training.micro_batch):
        gpus = parallel.model_size * data
        planned = plan(config, gpus, vocab_size=vocab_size, block_length=block_length)
        least = planned.heaviest.peak
        if least <= usable_bytes:
            return LayoutFit(parallel, planned, least)
    return LayoutFit(parallel, None, least)


def legal_layouts(
    config: Config, *, vocab_size: int, block_length: int
) -> Iterator[ParallelConfig]:
    """Layouts of this model that `Config.validate` accepts.

    Tensor and pipeline sizes are powers of two up to 8 and 16; blocks are recomputed not at all,
    all but their products, every second one or all. Besides, each is as configured.
    """
    config = _resolved(config, vocab_size, block_length)
    parallel = config.parallel
    recomputations = {(0, "full"), (1, "selective"), (1, "full"), (2, "full")}
    if parallel.recompute_every:
        recomputations.add((parallel.recompute_every, parallel.recompute_mode))
    sizes = [
        [(name, size) for size in sorted({*_divisors(MOST[name]), configured})]
        for name, configured in parallel.axes.items()
    ]
    rest = itertools.product((1, 2, 3), (False, True), sorted(recomputations))
    for axes, (zero_stage, sequence_parallel, (every, mode)) in itertools.product(
        itertools.product(*sizes), list(rest)
    ):
        parallel = ParallelConfig(
            **dict(axes),
            zero_stage=zero_stage,
            sequence_parallel=sequence_parallel,
            recompute_every=every,
            recompute_mode=mode,
        )
        try:
            dataclasses.replace(config, parallel=parallel).validate()
        except ConfigError:
            continue
        yield parallel


def _resolved(config: Config, vocab_size: int, block_length: int) -> Config:
    """The configuration as for its dataset, checked; flash-attn need not be installed to plan."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size, attention="auto"),
        data=dataclasses.replace(config.data, block_length=block_length),
    )
    config.validate()
    return config


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _sent_bytes(
    config: Config, stages: list[StageMemory], data: int, accumulation: int, block_length: int
) -> int:
    """Estimate of the bytes one rank sends in a step, by ring collectives; the busiest stage."""
    model, parallel, training = config.model, config.parallel, config.training
    weight_bytes = BYTES[training.precision]
    hidden = training.micro_batch * block_length * model.hidden_size

    def ring(size: int, ranks: int) -> float:
        return size * (ranks - 1) / ranks

    busiest = 0.0
    for stage, memory in enumerate(stages):
        # Two row-parallel maps forward and two column-parallel ones backward, each an all-reduce
        # (two rings); under sequence parallelism their inputs are gathered once more.
        rings = memory.layers * (8 + 2 * parallel.sequence_parallel)
        if parallel.recompute_every:
            # Collectives are no products: selective recomputation runs them again too.
            rings += 4 * memory.layers // parallel.recompute_every
        sent = accumulation * ring(rings * weight_bytes * hidden, parallel.tensor)
        weights = weight_bytes * memory.parameters
        if parallel.zero_stage == 1:
            # Float32 gradients to their owners, and weights back from them.
            sent += ring(4 * memory.parameters + weights, data)
        elif parallel.zero_stage == 2:
            sent += (accumulation + 1) * ring(weights, data)
        else:
            sent += 3 * accumulation * ring(weights, data)
        neighbours = (stage > 0) + (stage < len(stages) - 1)
        split = parallel.tensor if parallel.sequence_parallel else 1
        sent += accumulation * neighbours * BYTES[model.residual_dtype] * hidden // split
        busiest = max(busiest, sent)
    return round(busiest)
