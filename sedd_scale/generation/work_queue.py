"""Work dealt to whoever is free, over all processes and nodes, each item once.

One counter in a key-value store that the first process serves: a rank asks for the next number when
it has finished its last, so a slow rank takes fewer items and holds nobody up. What an item gives
must not depend on who takes it; that is the caller's part.
"""

import os
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from sedd_scale.errors import TrainingError
from sedd_scale.parallel.agreement import from_first
from sedd_scale.parallel.layout import Layout

_POLL_SECONDS = 0.05


class WorkQueue:
    """Items in a fixed order, dealt one by one; made by all processes together.

    Args:
        layout: tensor-parallel ranks of one model take each item together.
        items: in the order they are dealt; those of the first process count.
        counters: names of what `finish` adds up.
    """

    def __init__(self, layout: Layout, items: Sequence[int], counters: Sequence[str] = ()) -> None:
        self._layout = layout
        self.counters = tuple(counters)
        self._store: dist.Store = dist.HashStore()
        self._items = list(items)
        if layout.world_size > 1:
            host = os.environ.get("MASTER_ADDR", "localhost")

            def serve() -> tuple[list[int], int]:
                store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
                self._store = store
                return self._items, store.port

            self._items, port = from_first(serve)
            if layout.rank != 0:
                self._store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def claim(self) -> int | None:
        """The next item, or None when all are dealt; tensor-parallel ranks call it together."""
        place = 0
        if self._layout.tensor_rank == 0:
            place = self._add("dealt", 1) - 1
        if self._layout.tensor > 1:
            group = self._layout.tensor_group
            shared = torch.tensor([place], dtype=torch.int64, device=self._layout.device)
            dist.broadcast(shared, src=dist.get_process_group_ranks(group)[0], group=group)
            place = int(shared)
        return self._items[place] if place < len(self._items) else None

    def finish(self, *amounts: int) -> None:
        """Count one item as done, and add to the counters in their order."""
        if self._layout.tensor_rank == 0:
            for name, amount in zip(self.counters, amounts):
                self._add(f"counter/{name}", amount)
            self._add("finished", 1)

    def totals(self) -> tuple[int, ...]:
        """The counters, summed over all ranks so far."""
        return tuple(self._add(f"counter/{name}", 0) for name in self.counters)

    def wait_for_all(self) -> None:
        """Return when every item is finished, however long the slowest takes.

        A collective would give up after the process group's timeout.
        """
        while self._add("finished", 0) < len(self._items):
            time.sleep(_POLL_SECONDS)
        self.wait_at("all finished")

    def wait_at(self, place: str) -> None:
        """Return when every process has come to the place, whose name serves once."""
        self._add(f"at/{place}", 1)
        while self._add(f"at/{place}", 0) < self._layout.world_size:
            time.sleep(_POLL_SECONDS)
        if self._layout.world_size > 1:
            dist.barrier()  # nobody asks any more when the first process takes the store away

    def _add(self, key: str, amount: int) -> int:
        try:
            return int(self._store.add(key, amount))
        except dist.DistError as error:
            raise TrainingError(
                "the first process, which deals out the work, is gone: start the same command "
                "again to resume from what is written"
            ) from error
