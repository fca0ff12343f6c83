"""Signals, hangs and kills of real processes: what is saved, how they end, and how they go on.

One run of two ranks is stopped, frozen, killed and stopped again, and goes on each time; in the end
it must have the losses of the run that nothing happened to, bit for bit.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sedd_scale.training.signals import EXIT_LOST_RANK, EXIT_STOPPED
from tests.training.conftest import Faults
from tests.training.live_run import SMALL, STEPS, LiveRun, Torchrun, last_step, losses


@dataclass
class Story:
    """What happened to the run, chapter by chapter."""

    run_dir: Path
    expected: dict[int, float]
    stop_codes: list[int]
    stopped_at: int
    stop_checkpoints: list[str]
    stop_output: str
    hang_codes: list[int]
    hang_errors: list[str]
    stacks: str
    stacks_of_frozen: bool
    killed_while_saving: bool
    relaunched: str
    relaunch_code: int
    end_codes: list[int]


@pytest.fixture(scope="module")
def story(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("live")
    overrides = (f"data.path={faults.dataset}", *SMALL)
    run_dir = folder / "run"
    checkpoints = run_dir / "checkpoints"

    def saving(step: int) -> Callable[[], bool]:
        return lambda: any(int(path.name[5:-4]) >= step for path in checkpoints.glob("step-*.tmp"))

    with LiveRun(2, run_dir, overrides, folder / "stopped") as stopped:
        stopped.until_step(5)
        stopped.send(signal.SIGUSR1, 1)
        stopped.until(saving(1))
        stopped.send(signal.SIGTERM, 0)
        stopped.send(signal.SIGUSR1, 1)
        stop_codes = stopped.codes()
        stop_output = stopped.output() + stopped.errors()
    stopped_at = last_step(run_dir)
    stop_checkpoints = sorted(path.name for path in checkpoints.iterdir())

    watched = ("training.hang_floor=1.0", "training.hang_factor=100")
    with LiveRun(2, run_dir, (*overrides, *watched), folder / "frozen") as frozen:
        frozen.until_step(stopped_at + 8)
        frozen.send(signal.SIGSTOP, 1)
        first = frozen.code(0)
        stacks_of_frozen = (run_dir / "stacks-rank-1.txt").exists()
        frozen.send(signal.SIGCONT, 1)
        hang_codes = [first, frozen.code(1)]
        hang_errors = [frozen.errors(0), frozen.errors(1)]
    stacks = (run_dir / "stacks-rank-0.txt").read_text()

    log = folder / "torchrun.log"
    with Torchrun(2, run_dir, overrides, log, "--max-restarts=2") as relaunched:
        relaunched.until(saving(stopped_at + 9))
        os.kill(relaunched.workers()[1], signal.SIGKILL)
        killed_while_saving = saving(stopped_at + 9)()
        killed_at = last_step(run_dir)
        relaunched.until(lambda: last_step(run_dir) > killed_at + 2)
        relaunched.send_to_all(signal.SIGTERM)
        relaunch_code = relaunched.code()
        output = relaunched.output()

    with LiveRun(2, run_dir, overrides, folder / "end") as end:
        end_codes = end.codes()
    return Story(
        run_dir=run_dir,
        expected=losses(faults.folder / "undisturbed"),
        stop_codes=stop_codes,
        stopped_at=stopped_at,
        stop_checkpoints=stop_checkpoints,
        stop_output=stop_output,
        hang_codes=hang_codes,
        hang_errors=hang_errors,
        stacks=stacks,
        stacks_of_frozen=stacks_of_frozen,
        killed_while_saving=killed_while_saving,
        relaunched=output,
        relaunch_code=relaunch_code,
        end_codes=end_codes,
    )


def test_a_signal_to_one_rank_stops_all_at_the_same_step_saved(story: Story) -> None:
    assert story.stop_codes == [EXIT_STOPPED, EXIT_STOPPED]
    assert story.stop_checkpoints == ["latest", f"step-{story.stopped_at}"]
    assert f"stopped by a signal at step {story.stopped_at}: saved" in story.stop_output
    assert "Traceback" not in story.stop_output


def test_a_frozen_rank_ends_the_others_with_their_stacks(story: Story) -> None:
    assert story.hang_codes == [EXIT_LOST_RANK, EXIT_LOST_RANK]
    waiting, frozen = story.hang_errors
    assert "rank 0: no progress for" in waiting and "stacks follow" in waiting
    assert story.stacks.startswith("rank 0: no progress for")
    assert "train_step" in story.stacks and "Thread" in story.stacks
    assert not story.stacks_of_frozen
    # Thawed, it finds that it is alone, and says so in one line; on a busy machine its watchdog may
    # be first. A CUDA build of torch warns of a machine without a GPU.
    said = [line for line in frozen.splitlines() if not line.startswith("W")]
    alone = len(said) == 1 and "rank 1: a rank was lost" in said[0]
    assert alone or said[0].startswith("rank 1: no progress for"), frozen


def test_a_killed_rank_is_restarted_by_the_launcher_and_the_run_goes_on(story: Story) -> None:
    assert story.killed_while_saving
    lost = [line for line in story.relaunched.splitlines() if "a rank was lost" in line]
    assert len(lost) <= 1 and "-9" in story.relaunched
    assert story.relaunched.count("resumed ") == 2


def test_a_requested_stop_is_not_restarted(story: Story) -> None:
    assert story.relaunched.count("stopped by a signal at step") == 1
    assert story.relaunch_code == 1, "torchrun's own code after a signal to itself"


def test_the_disturbed_run_has_the_losses_of_the_undisturbed_one(story: Story) -> None:
    assert story.end_codes == [0, 0]
    assert list(story.expected) == list(range(1, STEPS + 1))
    assert losses(story.run_dir) == story.expected
