"""Weights on their way: what ranks updated, gathered under the next forward pass (ZeRO 1 and 2).

Weights lie in buckets, which are groups of the optimizer, so that DeepSpeed flattens, cuts and
reduces each by itself. Where it would gather all of them and then go on, the gathers only start
here; before a layer computes, it waits for the buckets that its weights lie in.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sedd_scale.engine.zero.base import GatheringZero
from sedd_scale.planning.model_states import EXCHANGE_BUCKET

# A small network's are cut as well, for its exchange to lie under its passes.
_FEWEST_BUCKETS = 4


def exchange_buckets(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbouring weights as groups of an optimizer, each of which is gathered by itself."""
    most = min(EXCHANGE_BUCKET, sum(weight.numel() for weight in weights) // _FEWEST_BUCKETS)
    buckets: list[list[nn.Parameter]] = []
    filled = most
    for weight in weights:
        if filled >= most:
            buckets.append([])
            filled = 0
        buckets[-1].append(weight)
        filled += weight.numel()
    return buckets


class WeightGathers:
    """The working weights that travel after a step. Whoever else reads weights calls `finish`.

    Args:
        zero: ZeRO 1 or 2, with more than one data-parallel rank.
        layers: the network's, in the order in which they compute.
    """

    def __init__(self, zero: GatheringZero, layers: Sequence[nn.Module]) -> None:
        self._whole, layout = zero.flat_weights, zero.layout
        self._group, self._rank = layout.data_group, layout.data_rank
        self._on_their_way: dict[int, Any] = {}
        bucket_of = {
            weight: index for index, weights in enumerate(zero.weights) for weight in weights
        }
        needs = [sorted({bucket_of[weight] for weight in layer.parameters()}) for layer in layers]
        layers[0].register_forward_pre_hook(lambda *_: self._wait(needs[0]))
        # After the layer before, since a head is not always called as a module.
        for layer, needed in zip(layers, needs[1:]):
            layer.register_forward_hook(functools.partial(self._wait_after, needed))
        _OF_WEIGHTS[id(self._whole)] = self
        if not isinstance(zero.module.all_gather_dp_groups, _Gather):
            zero.module.all_gather_dp_groups = _Gather(zero.module.all_gather_dp_groups)

    def owns(self, weights: list[Tensor]) -> bool:
        """Whether it gathers these flat weights."""
        return weights is self._whole

    @torch.no_grad()
    def start(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """Begin to gather each bucket from the parts it is cut into; the last gathers are over."""
        assert not self._on_their_way
        for bucket, (whole, of_ranks) in enumerate(zip(self._whole, parts, strict=True)):
            self._on_their_way[bucket] = dist.all_gather_into_tensor(
                whole, of_ranks[self._rank], group=self._group, async_op=True
            )

    def finish(self) -> None:
        """Wait for all that is on its way; on a GPU the stream does, not the host."""
        self._wait(list(self._on_their_way))

    def _wait(self, buckets: Iterable[int]) -> None:
        for bucket in buckets:
            work = self._on_their_way.pop(bucket, None)
            if work is not None:
                work.wait()

    def _wait_after(self, buckets: Iterable[int], *_: Any) -> None:
        self._wait(buckets)


class _Gather:
    """In DeepSpeed's place: only starts, where an engine's weights are ours to gather."""

    def __init__(self, at_once: Callable[..., None]) -> None:
        self._at_once = at_once

    def __call__(self, groups_flat: Any, partitioned_param_groups: Any, **rest: Any) -> None:
        gathers = _OF_WEIGHTS.get(id(groups_flat))
        if gathers is not None and gathers.owns(groups_flat):
            gathers.start(partitioned_param_groups)
        else:
            self._at_once(
                groups_flat=groups_flat, partitioned_param_groups=partitioned_param_groups, **rest
            )


_OF_WEIGHTS: "weakref.WeakValueDictionary[int, WeightGathers]" = weakref.WeakValueDictionary()
