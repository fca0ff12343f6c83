"""The error of a broken connection, as the one line that says what happened and when.

When a process of the job ends, the others get an error from inside whatever collective they are in,
with a long traceback of layers that have no part in it. What matters is that a rank was lost, after
which step, and what to do.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

from sedd_scale.errors import LostRankError

# gloo raises bare RuntimeErrors, which begin with the place in its source.
_OF_GLOO = re.compile(r"gloo/|Connection (closed|reset) by peer|Broken pipe")
_REASON = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|Timed out[^.\n\[]*|remote process exited"
)


@contextlib.contextmanager
def lost_ranks_in_one_line(where: Callable[[], str]) -> Iterator[None]:
    """Within, the error of a connection that broke becomes a `LostRankError`.

    Args:
        where: what this rank was at, as "in the step after step 7"; asked after the error.

    Raises:
        LostRankError: another process ended, or cannot be reached any more.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        known = _REASON.search(str(error))
        reason = known[0] if known else " ".join(str(error).split())[:200]
        raise LostRankError(
            f"a rank was lost {where()} ({reason}): the "
            f"messages of the rank that ended first say why; exit code {LostRankError.exit_code}; "
            "start the same command again to go on from the last checkpoint"
        ) from error


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective failed for want of another process, not for its arguments."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or _OF_GLOO.search(str(error)) is not None
