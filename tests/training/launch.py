"""Starts the processes of `checkpoint_worker.py` and waits for them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("checkpoint_worker.py")


class Launch:
    """`num_processes` workers on one scenario, running until `wait`."""

    def __init__(self, num_processes: int, scenario: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "ignore",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(num_processes),
        }
        self._logs = [folder / f"{scenario}-{rank}.log" for rank in range(num_processes)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            with log.open("wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER), scenario, str(folder)],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, timeout: float = 240.0) -> None:
        """Wait for all; if one fails, end the others and show its log."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in self._processes):
                failed = [process.poll() not in (None, 0) for process in self._processes]
                if any(failed) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            time.sleep(0.2)  # others that fail for the same reason say so too
            codes = [process.poll() for process in self._processes]
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        for code, log in zip(codes, self._logs):
            assert code == 0, f"exit code {code} (None: still running)\n{log.read_text()[-4000:]}"
