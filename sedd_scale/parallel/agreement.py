"""What the ranks tell each other: values, errors, and the shards that they found damaged."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sedd_scale.data.joint_reader import Shard
from sedd_scale.errors import SeddScaleError
from sedd_scale.parallel.layout import Layout

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The value of every process of the group, by rank, on each of them; collective."""
    # One process asks nobody: with NCCL alone it could not, of what lies on the host.
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `action` gives on the first process, on every one; its user error too. Collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (SeddScaleError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every process the error of the first process that has one.

    Collective over all processes.
    """
    for found in gathered(error, group):
        if found is not None:
            raise found


@contextlib.contextmanager
def together(kind: type[Exception], group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """An error of this kind within, on any process, is raised on every process at the end.

    Collective over all processes; any other error leaves at once, without the others.
    """
    error = None
    try:
        yield
    except kind as caught:
        error = caught
    raise_together(error, group)


class Agreement:
    """Makes the shards that some ranks found damaged known to all.

    In a process group of its own, on the host, so that a background thread may use it while the
    network trains. Every rank has to make the same calls.

    Args:
        policy: data.on_bad_shard; where it is "stop" there is nothing to agree on.
    """

    def __init__(self, layout: Layout, policy: str) -> None:
        self._group: dist.ProcessGroup | None = None
        if policy == "skip" and layout.world_size > 1:
            self._group = dist.new_group(backend="gloo")

    def union(self, shards: set[Shard]) -> set[Shard]:
        """The shards that any rank found, on every rank."""
        if self._group is None:
            return shards
        found = torch.tensor([len(shards)])
        dist.all_reduce(found, group=self._group)
        if not found.item():
            return set()
        return set().union(*gathered(shards, self._group))
