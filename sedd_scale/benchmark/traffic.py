"""Bytes that collectives send, counted where PyTorch dispatches them, and the fewest that must be.

A collective of n ranks on S bytes is charged what its best algorithm sends, on average over the
ranks: all-reduce 2 S (n - 1) / n; reduce-scatter and all-gather of S bytes in all, broadcast and
reduce S (n - 1) / n; a message its size.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_scale.config import Config
from sedd_scale.parallel.layout import Layout
from sedd_scale.planning.model_states import MAX_LIVE_PARAMETERS, MUON, update_rule


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(_bytes(tensor) for tensor in tensors)


# Operator: name, where its whole tensor is among the arguments, and what a rank sends of it.
_ALL, _TWICE = 1.0, 2.0
_COLLECTIVES: dict[str, tuple[str, int, float]] = {
    "allreduce_": ("all-reduce", 0, _TWICE),
    "allreduce_coalesced_": ("all-reduce", 0, _TWICE),
    "reduce_": ("reduce", 0, _ALL),
    "broadcast_": ("broadcast", 0, _ALL),
    "allgather_": ("all-gather", 0, _ALL),
    "_allgather_base_": ("all-gather", 0, _ALL),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, _ALL),
    "reduce_scatter_": ("reduce-scatter", 1, _ALL),
    "_reduce_scatter_base_": ("reduce-scatter", 1, _ALL),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, _ALL),
}
_WITHOUT_DATA = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_")


class CountedTraffic(TorchDispatchMode):
    """Within it, `sent` adds up bytes by (collective, group); group names the ranks that met."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str]] = Counter()
        self._names: dict[tuple[int, ...], str] = {}
        for name, group in (("tensor", layout.tensor_group), ("data", layout.data_group)):
            self._names[tuple(dist.get_process_group_ranks(group))] = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.partition("::")[2], func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, func: Any, args: tuple[Any, ...]) -> None:
        if operator in _WITHOUT_DATA:
            return
        if operator == "send":
            self.sent["send", "pipeline"] += _bytes(args[0])
            return
        groups = [
            value
            for argument, value in zip(func._schema.arguments, args)
            if argument.name == "process_group"
        ]
        group = dist.ProcessGroup.unbox(groups[0])
        if operator == "alltoall_base_":  # all but what a rank sends to itself
            _, given, _, _, numbers, *_ = args
            sent = sum(numbers) - numbers[group.rank()]
            self.sent["all-to-all", "several"] += sent * given.element_size()
            return
        assert operator in _COLLECTIVES, f"{operator} is not counted"
        name, place, times = _COLLECTIVES[operator]
        size = group.size()
        if size > 1:
            ranks = tuple(dist.get_process_group_ranks(group))
            where = self._names.get(ranks, "several")
            self.sent[name, where] += round(times * _bytes(args[place]) * (size - 1) / size)


def required_traffic(
    config: Config, layout: Layout, *, parameters: Mapping[str, int], rows: int
) -> dict[str, float]:
    """The fewest bytes a rank sends in a step, on average over all ranks, by kind of group.

    Tensor ranks: an all-reduce of the hidden states for each pair of products in the block, each
    way, one for the embedding and one for the gradient of the head's rows, three numbers a row for
    absorb's loss and four for uniform's. Under sequence parallelism a reduce-scatter and an
    all-gather take an all-reduce's place, and the backward pass gathers once more what it did not
    keep (arXiv 2205.05198); gradients of what is replicated are summed. Data ranks: gradients to
    their owners and weights back (arXiv 1910.02054); ZeRO 2 and 3 reduce each micro-batch, and
    ZeRO 3 gathers weights for each pass where they are more than `MAX_LIVE_PARAMETERS`. Pipeline
    stages: the hidden states with the conditioning and back. Muon: a stage's matrices to their
    owners and back, over its tensor and data ranks. Scalars are not counted.

    Args:
        parameters: numbers that this process holds of each parameter, before ZeRO.
        rows: of the loss, in this process's share of the step.
    """
    model, parallel = config.model, config.parallel
    size = 2 if config.training.precision == "bf16" else 4
    residual = {"fp32": 4, "bf16": 2}[model.residual_dtype]
    micro_batches = config.accumulation(layout.world_size)
    batch, width, layers = config.training.micro_batch, model.hidden_size, model.num_layers
    assert config.data.block_length is not None
    hidden = batch * config.data.block_length * width
    share = _share_of(layout.tensor)
    # The embedding, the head and the blocks lie on different stages: the average over them.
    tensor = data = pipeline = 0.0
    if layout.tensor > 1:
        statistics = config.graph.facts.row_statistics
        if layout.sequence_parallel:
            # Forward a gather and a scatter for two pairs, backward one gather more each.
            moved = (4 + 6) * layers * hidden * size
            # The embedding is scattered forward and gathered backward, the head the reverse.
            moved += 4 * hidden * size
            vectors = batch * (6 * layers + 2) * width
            replicated = vectors + width * (3 * layers + 1)
            tensor = micro_batches * share * (moved + 2 * replicated * size)
        else:
            tensor = micro_batches * 2 * share * (4 * layers + 1) * hidden * size
            tensor += 2 * share * rows * width * size
        tensor += 2 * share * rows * statistics * 4
        tensor /= layout.pipeline
    if layout.data > 1:
        share = _share_of(layout.data)
        stage = parallel.zero_stage
        gradient = 4 if stage == 1 else size
        reductions = 1 if stage == 1 else micro_batches
        # DeepSpeed lets go of weights that were gathered only where they are too many to be kept.
        held = sum(parameters.values())
        kept = stage < 3 or held <= MAX_LIVE_PARAMETERS
        gathers = 1 if kept else 2 * micro_batches
        data = share * held * (reductions * gradient + gathers * size)
    if layout.pipeline > 1:
        rows_of_cond = -(-model.cond_width // width)
        part = layout.tensor if layout.sequence_parallel else 1
        packed = hidden / part + batch * rows_of_cond * width
        boundaries = (layout.pipeline - 1) / layout.pipeline
        pipeline = micro_batches * boundaries * (2 * packed * residual + 8 * batch)
    matrices = sum(
        numel
        for name, numel in parameters.items()
        if update_rule(config.optimizer.name, name) == MUON
    )
    ranks = layout.tensor * layout.data
    # Of the whole matrices a rank sends its part, and what it made of its own.
    muon = 2 * _share_of(ranks) * matrices * layout.tensor / ranks * 4
    return {"tensor": tensor, "data": data, "pipeline": pipeline, "several": muon}


def _share_of(ranks: int) -> float:
    return (ranks - 1) / ranks


def traffic_of(program: Callable[[], object], layout: Layout) -> Counter[tuple[str, str]]:
    """What this process sends while `program` runs, by (collective, group)."""
    with CountedTraffic(layout) as counted:
        program()
    return counted.sent
