"""The error of a broken connection, as the one line that says what happened and when.

When a process of the job ends, the others get an error from inside whatever collective they are in,
with a long traceback of layers that have no part in it. What matters is that a rank was lost, after
which step, and what to do.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

from sedd_scale.errors import LostRankError

# What torch's stores, gloo and NCCL say when there is nobody at the other end any more.
_BROKEN = re.compile(
    r"Connection (?:closed by peer|reset by peer|refused|was likely closed)|Broken pipe"
    r"|[Tt]imed out(?: [a-z ]+)?|[Tt]imeout(?: [a-z ]+)?|remote process exited"
    r"|communicator was aborted"
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
        reason = broken_connection(error)
        if reason is None:
            raise
        raise LostRankError(
            f"a rank was lost {where()} ({reason}): the "
            f"messages of the rank that ended first say why; exit code {LostRankError.exit_code}; "
            "start the same command again to go on from the last checkpoint"
        ) from error


def broken_connection(error: RuntimeError) -> str | None:
    """Why a collective failed for want of another process; None: for another reason."""
    from torch.distributed import DistError

    text = str(error)
    # gloo raises bare RuntimeErrors, which name the place in its source.
    found = _BROKEN.search(text) if isinstance(error, DistError) or "gloo" in text.lower() else None
    return found[0].strip() if found else None
