"""Named points of a save at which a test may stop a process.

A point costs a look into an empty dictionary; only code that calls `at` changes what happens there.
"""

from collections.abc import Callable

POINTS = (
    "before data",
    "within a data file",
    "data written",
    "before rename",
    "between rename and latest",
    "within removal",
)

_handlers: dict[str, Callable[[], None]] = {}


def at(point: str, handler: Callable[[], None]) -> None:
    """Let `handler` be called in this process whenever `point` is reached."""
    assert point in POINTS, point
    _handlers[point] = handler


def reach(point: str) -> None:
    """Called by the code at one of `POINTS`."""
    handler = _handlers.get(point)
    if handler is not None:
        handler()
