"""What the ranks tell each other: errors, and which shards of the data they found damaged."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from sedd_scale.data.joint_reader import Shard
from sedd_scale.parallel.layout import Layout


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every process the error of the first process that has one.

    Collective over all processes.
    """
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    for error in errors:
        if error is not None:
            raise error


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
        self._world_size = layout.world_size
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
        parts: list[set[Shard]] = [set() for _ in range(self._world_size)]
        dist.all_gather_object(parts, shards, group=self._group)
        return set().union(*parts)
