"""A run that loses half of its processes and gets them back has the losses of a steady one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.datasets import dataset_of_files, letters
from tests.repository import ROOT
from tests.tolerance import NETWORK
from tests.training.elastic_worker import LEGS
from tests.training.live_run import environment, free_port, losses

WORKER = Path(__file__).with_name("elastic_worker.py")


def test_four_processes_then_two_then_four_make_the_same_losses(tmp_path: Path) -> None:
    port, dataset = (
        str(free_port()),
        dataset_of_files(tmp_path / "data", letters(), block_length=16),
    )
    processes = []
    for rank in range(4):
        with (tmp_path / f"log-{rank}").open("w") as log:
            place = environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="4",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                PYTHONPATH=str(ROOT),
            )
            command = [sys.executable, str(WORKER), str(tmp_path), str(dataset)]
            processes.append(
                subprocess.Popen(command, env=place, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(tmp_path / f"log-{rank}").read_text()[-2000:] for rank in range(4)]
    assert codes == [0] * 4, logs
    resumed = [line for line in (tmp_path / "log-0").read_text().splitlines() if "resumed" in line]
    assert [int(line.split()[-1]) for line in resumed] == [step for _, step in LEGS[:-1]]
    steady, changing = losses(tmp_path / "steady"), losses(tmp_path / "changing")
    assert list(changing) == list(range(1, LEGS[-1][1] + 1))
    assert changing == pytest.approx(steady, rel=NETWORK, abs=0)
    first, second = LEGS[0][1], LEGS[1][1]
    before, after = ({s: run[s] for s in range(1, first + 1)} for run in (steady, changing))
    assert before == after, "the same processes, the same bits"
    assert changing[second] != 0
