"""Making the batches of the next steps while this one is computed."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Makes items of consecutive steps ahead of time in one background thread.

    `next(prefetcher)` gives `produce(first_step)`, then `produce(first_step + 1)` and so on. An
    exception in `produce` is raised by the `next` of its step. Use it in a `with`, or close it.

    Args:
        produce: makes the item of a step; called in the background, in order.
        first_step: the first step wanted.
        end_step: the step after the last one; None: without end.
        ahead: items in the making or waiting, at least 1.
    """

    def __init__(
        self,
        produce: Callable[[int], Item],
        first_step: int = 0,
        *,
        end_step: int | None = None,
        ahead: int = 2,
    ) -> None:
        assert ahead >= 1
        self._produce = produce
        self._next_step = first_step
        self._end_step = end_step
        self._pending: deque[Future[Item]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        for _ in range(ahead):
            self._ask()

    def _ask(self) -> None:
        if self._end_step is None or self._next_step < self._end_step:
            self._pending.append(self._thread.submit(self._produce, self._next_step))
            self._next_step += 1

    def __iter__(self) -> "Prefetcher[Item]":
        return self

    def __next__(self) -> Item:
        if not self._pending:
            raise StopIteration
        future = self._pending.popleft()
        item = future.result()
        self._ask()
        return item

    def close(self) -> None:
        """Drop what is waiting and end the thread, after the item now in the making."""
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
