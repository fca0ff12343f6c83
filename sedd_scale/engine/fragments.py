"""This process's ZeRO fragments: the parts of each parameter's float32 state that it updates.

DeepSpeed flattens a group of parameters, cuts the flat tensor over the data-parallel ranks and
gives each rank its float32 master weights and optimizer state; `engine.zero` knows where.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sedd_scale.engine.gathers import WeightGathers
from sedd_scale.engine.zero import Place, Zero
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.agreement import gathered
from sedd_scale.planning.model_states import UpdateRule

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


class ZeroFragments:
    """Access to masters, moments and averages of a DeepSpeed engine's parameters, by range.

    Making one is collective over the data-parallel ranks: it asserts that their fragments tile each
    parameter exactly once.

    Args:
        zero: of a DeepSpeedEngine (ZeRO 1, 2, 3) or PipelineEngine (ZeRO 1).
        gathers: of the engine's working weights, which are read here when they have arrived.

    Attributes:
        parameters: all of the engine's parameters.
        layout: where this process stands.
    """

    def __init__(
        self,
        zero: Zero,
        parameters: Sequence[LogicalParameter],
        gathers: WeightGathers | None = None,
    ) -> None:
        self.parameters, self.layout = parameters, zero.layout
        self._zero, self._gathers = zero, gathers
        self._partitions = zero.partitions
        assert all(partition.dtype == torch.float32 for partition in self._partitions)
        self._places = {logical.name: zero.place(logical) for logical in parameters}
        assert len(self._places) == len(parameters), "two parameters of one logical name"
        self._assert_tiled()

    def get(self, parameter: LogicalParameter, key: str) -> Fragment | None:
        """This process's fragment of one state tensor, or None where it owns no part of it.

        Args:
            key: of `state_keys`; all but the first exist once a step was
                made or `ensure_state` called.
        """
        place = self._places[parameter.name]
        if place is None:
            return None
        partition = self._partitions[place.partition]
        flat = partition.detach() if key == "master" else self._zero.adam.state[partition][key]
        return Fragment(flat.narrow(0, place.begin, place.numel), place.start)

    @property
    def partitions(self) -> list[Tensor]:
        """This process's masters, as the optimizer has them."""
        return self._partitions

    def place(self, parameter: LogicalParameter) -> Place | None:
        """Where this process's fragment lies in them; None where it owns no part of it."""
        return self._places[parameter.name]

    def rule(self, parameter: LogicalParameter) -> UpdateRule:
        """How it is updated."""
        rule: UpdateRule = self._zero.adam.rules[parameter.parameter]
        return rule

    def state_keys(self, parameter: LogicalParameter) -> tuple[str, ...]:
        """What is kept of a parameter, as its update rule says."""
        return self.rule(parameter).state_keys

    def states(self) -> Iterator[tuple[LogicalParameter, str]]:
        """Every parameter with every key of its state."""
        for parameter in self.parameters:
            for key in self.state_keys(parameter):
                yield parameter, key

    def working_copies(self, parameter: LogicalParameter) -> list[Tensor]:
        """What this process computes with in the range of its fragment, flat, as views.

        Of the whole shard where it holds that, and under ZeRO 3 of its partition: none, one or two.
        Between steps each is the master, rounded to the working weights' number format.
        """
        place = self._places[parameter.name]
        if place is None:
            return []
        self._finish_gathers()
        return self._zero.working_copies(parameter, place)

    def ensure_state(self) -> None:
        """Make the optimizer's state as before a first step, where there is none yet.

        DeepSpeed leaves it to the first step; a checkpoint must be able to fill it before.
        """
        groups = self._zero.adam.param_groups
        for index, partition in enumerate(self._partitions):
            rule = groups[self._zero.group_of(index)].get("rule")
            self._zero.adam.initialize_state(partition, rule)
        self._zero.link_state()

    def get_step(self) -> int:
        """Updates that the optimizer has made."""
        states = [self._zero.adam.state.get(partition) for partition in self._partitions]
        steps = {int(state["step"]) if state else 0 for state in states}
        assert len(steps) == 1, steps
        return steps.pop()

    def set_step(self, step: int) -> None:
        """Let the optimizer count on from `step` updates."""
        self.ensure_state()
        for partition in self._partitions:
            self._zero.adam.state[partition]["step"].fill_(step)

    def refresh_parameters(self) -> None:
        """Give the working parameters the masters' values; collective over data-parallel ranks."""
        self._finish_gathers()  # which would bring back what is overwritten now
        self._zero.refresh()
        self._finish_gathers()

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
            average = self._zero.adam.state[partition]["ema"]
            for a, b in zip(
                partition.detach().split(_SWAP_LENGTH), average.split(_SWAP_LENGTH), strict=True
            ):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    def _assert_tiled(self) -> None:
        group = self._zero.optimizer.dp_process_group
        ranges = {name: (p.start, p.numel) for name, p in self._places.items() if p is not None}
        of_ranks = gathered(ranges, group)
        for logical in self.parameters:
            end = 0
            for start, numel in sorted(r[logical.name] for r in of_ranks if logical.name in r):
                assert start == end, f"{logical.name}: fragments overlap or leave a gap at {end}"
                end += numel
            assert end == math.prod(logical.local_shape), f"{logical.name}: fragments end at {end}"
