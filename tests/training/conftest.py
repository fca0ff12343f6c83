"""The launch of two processes that several modules of tests look at."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.datasets import dataset_of_files, letters
from tests.repository import ROOT
from tests.training.live_run import SMALL, environment

WORKER = Path(__file__).with_name("fault_worker.py")


class Faults:
    """What two ranks of fault_worker.py found, and how their launch ended.

    Attributes:
        folder: holds their runs; `undisturbed` among them, a whole run of SMALL.
        dataset: what they were trained on.
    """

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.dataset = folder, dataset
        (folder / "overrides").write_text(" ".join(SMALL))
        finished = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node=2", str(WORKER), str(folder), str(dataset)),
            ],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=400,
        )
        self.code, self.errors = finished.returncode, finished.stderr
        files = [folder / f"found-{rank}.json" for rank in range(2)]
        assert all(file.exists() for file in files), (finished.stdout + self.errors)[-6000:]
        self._of_ranks = [json.loads(file.read_text()) for file in files]

    def __getitem__(self, name: str) -> Any:
        """What rank 0 found."""
        return self._of_ranks[0][name]

    def both(self, name: str) -> Iterator[Any]:
        """What each rank found."""
        return (found[name] for found in self._of_ranks)


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    folder = tmp_path_factory.mktemp("faults")
    return Faults(folder, dataset_of_files(folder / "data", letters(), block_length=16))
