"""This process's ZeRO fragments: the parts of each parameter's float32 state that it updates.

DeepSpeed flattens a group of parameters, cuts the flat tensor over the data-parallel ranks and
gives each rank its float32 master weights and optimizer state. Its three optimizers keep the map
from a parameter to that flat tensor in three ways; here it is one question with one answer.

| engine                    | optimizer                     | working weights                |
|---------------------------|-------------------------------|--------------------------------|
| ZeRO 1 and bf16           | BF16_Optimizer                | bf16, gathered from the masters|
| ZeRO 1 fp32, ZeRO 2       | DeepSpeedZeroOptimizer        | a copy, gathered               |
| ZeRO 3                    | DeepSpeedZeroOptimizer_Stage3 | a copy, partitioned alike      |
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from sedd_scale.engine.gathers import WeightGathers
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.agreement import gathered
from sedd_scale.parallel.layout import Layout

# Numbers exchanged at a time, so that a swap needs little memory of its own.
_SWAP_LENGTH = 1 << 24


@dataclass(frozen=True)
class Fragment:
    """A range of a parameter's flattened shard that this process owns.

    Attributes:
        flat: float32 [n], a view: writing to it writes the state.
        start: where the range begins in the flattened shard.
    """

    flat: Tensor
    start: int


@dataclass(frozen=True)
class _Place:
    """Where a parameter's range lies: `numel` from `begin` in partition `partition`."""

    partition: int
    begin: int
    numel: int
    start: int


class ZeroFragments:
    """Access to masters, moments and averages of a DeepSpeed engine's parameters, by range.

    Making one is collective over the data-parallel ranks: it asserts that their fragments tile each
    parameter exactly once.

    Args:
        engine: a DeepSpeedEngine (ZeRO 1, 2, 3) or PipelineEngine (ZeRO 1), float32 or bfloat16,
            whose optimizer is an `AdamWithEMA`.
        gathers: of the engine's working weights, which are read here when they have arrived.

    Attributes:
        parameters: all of the engine's parameters.
        layout: where this process stands.
    """

    def __init__(
        self,
        engine: Any,
        parameters: Sequence[LogicalParameter],
        layout: Layout,
        gathers: WeightGathers | None = None,
    ) -> None:
        self.parameters, self.layout = parameters, layout
        self._zero: Any = engine.optimizer
        self._gathers = gathers
        self._stage_3 = isinstance(self._zero, DeepSpeedZeroOptimizer_Stage3)
        self._partitions: list[Tensor]
        if self._stage_3:
            self._partitions = self._zero.fp32_partitioned_groups_flat
            place = self._place_in_stage_3
        elif isinstance(self._zero, BF16_Optimizer):
            self._partitions = self._zero.fp32_groups_flat_partition
            place = self._place_in_stages_1_and_2
        else:
            assert isinstance(self._zero, DeepSpeedZeroOptimizer), type(self._zero)
            self._partitions = self._zero.single_partition_of_fp32_groups
            place = self._place_in_stages_1_and_2
        assert all(partition.dtype == torch.float32 for partition in self._partitions)
        self._places = {logical.name: place(logical) for logical in parameters}
        assert len(self._places) == len(parameters), "two parameters of one logical name"
        self._assert_tiled()

    def get(self, parameter: LogicalParameter, key: str) -> Fragment | None:
        """This process's fragment of one state tensor, or None where it owns no part of it.

        Args:
            key: of `STATE_KEYS`; all but the first exist once a step was
                made or `ensure_state` called.
        """
        place = self._places[parameter.name]
        if place is None:
            return None
        partition = self._partitions[place.partition]
        flat = partition.detach() if key == "master" else self._zero.optimizer.state[partition][key]
        return Fragment(flat.narrow(0, place.begin, place.numel), place.start)

    def working_copies(self, parameter: LogicalParameter) -> list[Tensor]:
        """What this process computes with in the range of its fragment, flat, as views.

        Of the whole shard where it holds that, and under ZeRO 3 of its partition: none, one or two.
        Between steps each is the master, rounded to the working weights' number format.
        """
        place = self._places[parameter.name]
        if place is None:
            return []
        self._finish_gathers()
        tensor, copies = parameter.parameter, []
        if tuple(tensor.shape) == parameter.local_shape:
            copies.append(tensor.detach().reshape(-1).narrow(0, place.start, place.numel))
        if self._stage_3:
            partition: Tensor = tensor.ds_tensor  # type: ignore[attr-defined]
            copies.append(partition.detach().view(-1).narrow(0, 0, place.numel))
        return copies

    def ensure_state(self) -> None:
        """Make the optimizer's state as before a first step, where there is none yet.

        DeepSpeed leaves it to the first step; a checkpoint must be able to fill it before.
        """
        for partition in self._partitions:
            self._zero.optimizer.initialize_state(partition)
        if not self._stage_3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def get_step(self) -> int:
        """Updates that the optimizer has made."""
        states = [self._zero.optimizer.state.get(partition) for partition in self._partitions]
        steps = {int(state["step"]) if state else 0 for state in states}
        assert len(steps) == 1, steps
        return steps.pop()

    def set_step(self, step: int) -> None:
        """Let the optimizer count on from `step` updates."""
        self.ensure_state()
        for partition in self._partitions:
            self._zero.optimizer.state[partition]["step"].fill_(step)

    def refresh_parameters(self) -> None:
        """Give the working parameters the masters' values; collective over data-parallel ranks."""
        zero = self._zero
        if not self._stage_3:
            self._finish_gathers()  # which would bring back what is overwritten now
            zero.update_lp_params()
            self._finish_gathers()
            return
        # As after a step: parameters that are whole somewhere are stale, the small persistent ones
        # for good, so all are released, rewritten from the masters and those gathered again.
        zero._partition_all_parameters()
        for group in range(len(self._partitions)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _finish_gathers(self) -> None:
        if self._gathers is not None:
            self._gathers.finish()

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within, the model computes with the averaged weights; after, every bit is as before.

        Collective over data-parallel ranks on entry and on a normal exit. Take no step within.
        """
        self.ensure_state()
        self._swap_master_and_ema()
        self.refresh_parameters()
        try:
            yield
        finally:
            self._swap_master_and_ema()
        # Not in `finally`: after an error on one rank the others would not be there to gather.
        self.refresh_parameters()

    @torch.no_grad()
    def _swap_master_and_ema(self) -> None:
        for partition in self._partitions:
            average = self._zero.optimizer.state[partition]["ema"]
            for a, b in zip(
                partition.detach().split(_SWAP_LENGTH), average.split(_SWAP_LENGTH), strict=True
            ):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    def _place_in_stages_1_and_2(self, logical: LogicalParameter) -> _Place | None:
        mapping = logical.parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return _Place(
            partition=mapping.param_group_index,
            begin=mapping.hp_fragment_address.start,
            numel=mapping.hp_fragment_address.numel,
            start=mapping.lp_fragment_address.start,
        )

    def _place_in_stage_3(self, logical: LogicalParameter) -> _Place | None:
        parameter = logical.parameter
        partition, begin, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = padded * self._zero._get_param_partition_rank(parameter)
        numel = min(padded, math.prod(logical.local_shape) - start)
        return _Place(partition, begin, numel, start) if numel > 0 else None

    def _assert_tiled(self) -> None:
        group = self._zero.dp_process_group
        ranges = {name: (p.start, p.numel) for name, p in self._places.items() if p is not None}
        of_ranks = gathered(ranges, group)
        for logical in self.parameters:
            end = 0
            for start, numel in sorted(r[logical.name] for r in of_ranks if logical.name in r):
                assert start == end, f"{logical.name}: fragments overlap or leave a gap at {end}"
                end += numel
            assert end == math.prod(logical.local_shape), f"{logical.name}: fragments end at {end}"
