"""Signals that ask a run to stop: noted at any time, heeded at the end of a step by all ranks.

The command installs the handlers before anything heavy is imported; nothing heavy is needed here.
Threads and child processes started within `shielded` never see the signals, so that one sent to the
whole process group or to every process of a Slurm step ends no helper.
"""

import contextlib
import os
import signal
import threading
import types
from collections.abc import Iterator

from sedd_scale.errors import LostRankError

EXIT_STOPPED = 75
"""Exit code of a run that stopped at a signal: saved, to be started again (EX_TEMPFAIL)."""

EXIT_LOST_RANK = LostRankError.exit_code
"""Exit code of a rank that cannot go on because another one hangs or was lost."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Notes the first signal that asks this process to stop; later ones change nothing.

    Before `arm`, while there is nothing to save, SIGTERM and SIGINT end the process as they do by
    default; SIGUSR1 waits until then.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._armed = False

    def install(self) -> None:
        """Set the handlers; call it in the main thread before other threads exist."""
        assert threading.current_thread() is threading.main_thread()
        # What is started from here on inherits the mask; `arm` opens it for the main thread alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def arm(self) -> None:
        """From here on a signal is noted and no longer ends the process."""
        self._armed = True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])

    def disarm(self) -> None:
        """Block the stop signals until the process exits, whose exit code is settled."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wants_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Threads and processes started inside never receive the stop signals.

        One that arrives inside reaches the main thread on exit.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if not self._armed and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.received is None:
            self.received = signal.Signals(number)


def exit_code_after_stop() -> int:
    """The code with which a process ends after it stopped at a signal.

    A launcher that restarts failed workers would restart these: it gets 0.
    """
    restarts_left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )
    return 0 if restarts_left > 0 else EXIT_STOPPED
