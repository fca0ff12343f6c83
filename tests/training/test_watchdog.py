"""A rank that makes no progress writes down its stacks and ends."""

import threading
import time
from pathlib import Path

import pytest

from sedd_scale.config.sections import TrainingConfig
from sedd_scale.training.signals import EXIT_LOST_RANK
from sedd_scale.training.watchdog import Watchdog


def test_a_hang_dumps_stacks_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    training = TrainingConfig(hang_floor=0.3, hang_factor=3.0, hang_slow=20.0)
    with Watchdog(tmp_path, 3, training, end=end) as watchdog:
        assert watchdog.limit() == 20.0, "first steps are slow"
        for step in range(1, 5):
            time.sleep(0.01)
            watchdog.step_done(step)
        assert watchdog.limit() == 0.3
        with watchdog.slow("a save"):
            assert watchdog.limit() == 20.0
            time.sleep(0.6)
        assert not ended.is_set()
        assert ended.wait(10.0), "no progress, and nothing happens"
    assert codes == [EXIT_LOST_RANK]
    written = (tmp_path / "stacks-rank-3.txt").read_text()
    assert written.startswith("rank 3: no progress for ") and "after step 4" in written
    assert "test_a_hang_dumps_stacks_and_ends" in written
