"""ZeRO 3: weights in parts too; of its gradients only the norm is taken here, without a wait."""

import functools
import math
from collections.abc import Callable
from typing import Any

from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor

from sedd_scale.engine.zero.base import Place, Zero, norm_of_partition, square_of
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout


class PartitionedZero(Zero):
    """`DeepSpeedZeroOptimizer_Stage3`: a copy of the masters to work with, partitioned alike."""

    def __init__(self, engine: Any, layout: Layout) -> None:
        super().__init__(engine, layout)
        self.partitions = self.optimizer.fp32_partitioned_groups_flat

    def send_less(self) -> None:
        zero = self.optimizer
        zero.get_grad_norm_direct = functools.partial(norm_of_partition, self.layout)

    def before_update(self, judge: Callable[[Tensor], None]) -> None:
        super().before_update(judge)
        norms_of_groups = self.optimizer._get_norm_groups

        def get_norm_groups() -> list[Tensor]:
            norms: list[Tensor] = norms_of_groups()
            judge(square_of(combine_grad_norm_groups(norms)))
            return norms

        self.optimizer._get_norm_groups = get_norm_groups

    def group_of(self, partition: int) -> int:
        group: int = self.optimizer.sub_group_to_group_id[partition]
        return group

    def place_of(self, parameter: Tensor) -> Place | None:
        zero = self.optimizer
        partition, begin, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = padded * zero._get_param_partition_rank(parameter)
        numel = min(padded, math.prod(parameter.ds_shape) - start)  # type: ignore[attr-defined]
        return Place(partition, begin, numel, start) if numel > 0 else None

    def working_copies(self, logical: LogicalParameter, place: Place) -> list[Tensor]:
        partition: Tensor = logical.parameter.ds_tensor  # type: ignore[attr-defined]
        whole = super().working_copies(logical, place)
        held = self.place_of(logical.parameter)
        assert held is not None
        own = partition.detach().view(-1).narrow(0, place.begin - held.begin, place.numel)
        return [*whole, own]

    def link_state(self) -> None:
        """It finds the state by itself."""

    def refresh(self) -> None:
        # As after a step: parameters that are whole somewhere are stale, the small persistent ones
        # for good, so all are released, rewritten from the masters and those gathered again.
        zero = self.optimizer
        zero._partition_all_parameters()
        for group in range(len(self.partitions)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
