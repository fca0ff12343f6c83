"""Groups of blocks dealt over data-parallel ranks: each rank's results become all ranks'."""

from collections.abc import Callable
from typing import Any

from sedd_scale.evaluation.finished_groups import FinishedGroups
from sedd_scale.parallel.agreement import gathered
from sedd_scale.parallel.layout import Layout


def over_ranks(
    layout: Layout,
    count: int,
    work: Callable[[int], tuple[Any, ...]],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    finished: FinishedGroups | None = None,
) -> list[tuple[Any, ...]]:
    """work(0), ..., work(count - 1), each made by one data-parallel rank, on all; collective.

    Args:
        work: gives float64 arrays and numbers.
        on_progress: called with (done, all) of this rank.
        finished: what earlier goes have made, which is not made again, and where results are kept.
    """
    before = {} if finished is None else finished.found
    missing = [which for which in range(count) if which not in before]
    own = missing[layout.data_rank :: layout.data]
    results: dict[int, tuple[Any, ...]] = {}
    for done, which in enumerate(own, start=1):
        results[which] = work(which)
        if finished is not None:
            finished.add(which, results[which])
        on_progress(done, len(own))
    of_ranks = gathered(results, layout.data_group)
    merged = {which: result for part in of_ranks for which, result in part.items()}
    merged.update(before)
    return [merged[which] for which in range(count)]
