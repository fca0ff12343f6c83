"""The process of one tracker: reads records from its standard input until that ends.

    python -m sedd_scale.tracking.tracker_process MODULE:CLASS

A line of the input is a JSON object; the first holds the arguments of the class, each later one a
record: {"step": I, "values": {name: number}} or {"step": I, "samples": [{name: text}]}. What it
prints is read by `trackers`: {"error": ..., "what": "start", "log" or "finish"}, once at most. What
the tracker itself prints goes nowhere.
"""

import importlib
import json
import os
import sys
import threading
import time
from typing import Any, Protocol

_LOOK_SECONDS = 2.0
_ORPHAN_SECONDS = 60.0


class Tracker(Protocol):
    """A service that a run's numbers are sent to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one step's numbers; those that are not finite are None."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Take samples drawn from the model as it was after `step` updates, as a table."""

    def close(self) -> None:
        """Send what is not yet sent."""


def serve(name: str) -> int:
    """Feed the tracker `name` (module:class) from standard input; 1 after an error."""
    threading.Thread(target=_end_as_orphan, args=(os.getppid(),), daemon=True).start()
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    what = "start"
    try:
        module, _, factory = name.partition(":")
        arguments = json.loads(sys.stdin.readline())
        tracker: Tracker = getattr(importlib.import_module(module), factory)(**arguments)
        what = "log"
        for line in sys.stdin:
            record = json.loads(line)
            if "samples" in record:
                tracker.log_samples(record["step"], record["samples"])
            else:
                tracker.log(record["step"], record["values"])
        what = "finish"
        tracker.close()
    except Exception as error:  # a foreign service: whatever it raises, training goes on
        answer = {"what": what, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        os.write(answers, json.dumps(answer).encode() + b"\n")
        return 1
    return 0


def _end_as_orphan(parent: int) -> None:
    """End this process some time after the run's, whatever the service is waiting for."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    code = serve(sys.argv[1])
    if code:
        # What the service has left running might keep the process from ending.
        os._exit(code)
    sys.exit(code)
