"""Trackers that do what services do on bad days, and one that works."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any


class Good:
    """Writes what it is given into a file."""

    def __init__(self, *, path: str) -> None:
        self.path = Path(path)
        print("a service that chats on standard output")

    def log(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        self.log(step, {"samples": len(samples)})

    def close(self) -> None:
        self.log(-1, {})


class Bad(Good):
    """Raises, dies or blocks for ever, at one of its calls.

    Args:
        at: "start", "log" or "finish".
        how: "raise", "die" or "block".
    """

    def __init__(self, *, path: str, at: str, how: str) -> None:
        super().__init__(path=path)
        self.at, self.how = at, how
        self.reach("start")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.reach("log")
        super().log(step, values)

    def close(self) -> None:
        self.reach("finish")

    def reach(self, place: str) -> None:
        if place != self.at:
            return
        if self.how == "raise":
            raise ConnectionError("the network\nis gone")
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
