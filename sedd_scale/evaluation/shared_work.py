"""Groups of blocks dealt over data-parallel ranks: each rank's results become all ranks'."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sedd_scale.parallel.layout import Layout

T = TypeVar("T")


def over_ranks(
    layout: Layout,
    count: int,
    work: Callable[[int], T],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[T]:
    """work(0), ..., work(count - 1), each made by one data-parallel rank, on all; collective.

    Args:
        on_progress: called with (done, all) of this rank.
    """
    own = range(layout.data_rank, count, layout.data)
    results: dict[int, T] = {}
    for done, which in enumerate(own, start=1):
        results[which] = work(which)
        on_progress(done, len(own))
    of_ranks: list[Any] = [results]
    if layout.data > 1:
        of_ranks = [None] * layout.data
        dist.all_gather_object(of_ranks, results, group=layout.data_group)
    merged = {which: result for part in of_ranks for which, result in part.items()}
    return [merged[which] for which in range(count)]
