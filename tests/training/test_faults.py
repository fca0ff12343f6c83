"""Bad steps, flipped bits, failing and slow saves, replays and a hang, in two real processes."""

import json
import math
from pathlib import Path

import pytest

from sedd_scale.errors import ConfigError
from sedd_scale.training.replay import recorded
from sedd_scale.training.signals import EXIT_LOST_RANK
from tests.training.conftest import Faults
from tests.training.fault_worker import LAYOUTS, MATRIX, VECTOR
from tests.training.live_run import losses


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_that_is_not_finite_leaves_every_bit_as_it_was(faults: Faults, name: str) -> None:
    for of_rank in faults.both(name):
        assert of_rank["applied"] == [True, True, False, True]
        assert of_rank["finite"] == [True, True, False, True]
        assert of_rank["changed"] == [] and of_rank["changed_by_good_ones"]
        assert of_rank["skipped"] == 1 and of_rank["optimizer_step"] == 4
    first, second = faults.both(name)
    assert first["lines"] == second["lines"] and len(first["lines"]) == 1
    (record,) = [json.loads(line) for line in (faults.folder / name / "bad_steps.jsonl").open()]
    batch = record["last_sample"] - record["first_sample"] + 1
    assert record["step"] == 3 and record["first_sample"] == 2 * batch
    assert (record["action"], record["cause"]) == ("skipped", "nonfinite")
    assert record["loss"] is None and len(record["batch_fingerprint"]) == 16


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_host_reads_a_step_once_after_its_update(faults: Faults, name: str) -> None:
    for of_rank in faults.both(name):
        *updates, read = of_rank["events"]
        assert read == "tolist" and updates and set(updates) == {"update"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_flipped_bit_is_found_and_its_parameter_and_rank_named(faults: Faults, name: str) -> None:
    first, second = (of_rank["flips"] for of_rank in faults.both(name))
    assert first == second, "the ranks disagree"
    for flip in (f"{MATRIX} weight", f"{VECTOR} weight"):
        parameter = flip.partition(" ")[0]
        message = first[flip]
        assert message.startswith(f"step 7: {parameter}: the weight"), (flip, message)
        assert "rank 1" in message or "ranks [0, 1]" in message
        assert "1 parameter in all" in message
    if name.startswith("TP2"):
        assert "its float32 exp_avg" in first[f"{VECTOR} exp_avg"]
        assert "tensor-parallel ranks [0, 1]" in first[f"{VECTOR} exp_avg"]
    # Of a moment of a parameter that is split there is no second copy.
    moment = "momentum" if "Muon" in name else "exp_avg"
    assert first[f"{MATRIX} {moment}"] == "nothing"


def test_a_save_that_fails_on_another_rank_is_reported_and_not_published(faults: Faults) -> None:
    said = faults["failed save"]["said"]
    (warning,) = [line for line in said.splitlines() if line.startswith("warning")]
    assert "step-8 on rank 1: " in warning and "No space left on device" in warning
    assert faults["latest while failing"] == ["", "step-4", "step-4"]
    for of_rank in faults.both("failed save"):
        assert of_rank["ended"] == "finished"
        assert of_rank["checkpoints"] == ["step-4", "step-9"] and of_rank["latest"] == "step-9"
    for of_rank in faults.both("failed save stops"):
        assert "step-8 on rank 1: " in of_rank["ended"] and "No space" in of_rank["ended"]
        assert of_rank["checkpoints"] == ["step-4"] and of_rank["latest"] == "step-4"


def test_saves_slower_than_their_interval_hold_the_run_up_and_lose_nothing(faults: Faults) -> None:
    slow = faults["slow saves"]
    assert slow["ended"] == "finished"
    assert slow["said"].count("saving waits for the checkpoint of step") == 3
    assert slow["checkpoints"] == [f"step-{step}" for step in range(1, 5)]
    assert list(losses(faults.folder / "slow")) == [1, 2, 3, 4]


def test_a_passed_over_checkpoint_is_in_the_metrics_and_on_the_console(faults: Faults) -> None:
    run_dir = faults.folder / "failing"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    (warning,) = [line for line in lines if "warning" in line]
    assert warning["step"] == 4
    assert "__1_0.distcp" in warning["warning"] and "step-4 instead" in warning["warning"]
    assert warning["warning"] in faults["after damage"]["said"]
    # The lost steps were made again, each once in the history.
    assert list(losses(run_dir)) == list(range(1, 13))
    expected = losses(faults.folder / "undisturbed")
    assert all(loss == expected[step] for step, loss in losses(run_dir).items())


def test_a_stop_at_finite_spikes_is_not_called_an_overflow(faults: Faults) -> None:
    ended = faults["spikes"]["ended"]
    assert "its numbers are finite, and their z-scores" in ended
    assert "2 updates in a row were left out (training.stop_after_skips)" in ended
    assert "overflow" not in ended and "finite:" not in ended
    record = faults["spike records"][-1]
    assert (record["action"], record["cause"]) == ("stopped", "spike")
    assert f"--replay {record['step']}" in ended


def test_a_replayed_spike_has_the_recorded_numbers_bit_for_bit(faults: Faults) -> None:
    first, second = faults.both("spike replayed")
    assert second == []
    text = "\n".join(first)
    record = faults["spike records"][-1]
    assert f"step {record['step']} of " in text and "recorded as stopped (spike)" in text
    assert f"{record['batch_fingerprint']}, as recorded" in text
    assert text.count("as recorded, bit for bit") == 2
    of_ranks = [line for line in first if line.startswith("rank ")]
    assert [line.split(":")[0] for line in of_ranks] == ["rank 0", "rank 1"]
    mean = sum(float(line.split("loss ")[1].split(";")[0]) for line in of_ranks) / 2
    assert math.isclose(mean, record["loss"], rel_tol=1e-4)
    assert first[-1].startswith("diagnosis: its numbers are finite")


def test_a_replayed_step_that_is_not_finite_says_what_was_first(faults: Faults) -> None:
    text = "\n".join(faults["wild replayed"])
    record = faults["wild records"][-1]
    assert record["cause"] == "nonfinite" and "as recorded" in text
    diagnosis = faults["wild"]["ended"].split(": ", 1)[1].split("; stopped by")[0]
    assert f"diagnosis: {diagnosis}" in text


def test_only_recorded_steps_can_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--replay 3: .*records no such step; .*: none"):
        recorded(tmp_path, 3)
    (tmp_path / "bad_steps.jsonl").write_text('{"step": 4, "loss": 1.5}\n{"step": 5, "lo')
    assert recorded(tmp_path, 4)["loss"] == 1.5
    with pytest.raises(ConfigError, match=r"--replay 5: .*recorded are: 4$"):
        recorded(tmp_path, 5)


def test_a_hang_within_a_save_dumps_the_stacks_of_all_ranks_and_ends_the_launch(
    faults: Faults,
) -> None:
    assert faults.code == 1, "torchrun's own"
    assert f"exitcode  : {EXIT_LOST_RANK}" in faults.errors
    for rank in range(2):
        stacks = (faults.folder / f"hanging/stacks-rank-{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank}: no progress for") and "in a save after" in stacks
        assert "checkpoint/writer.py" in stacks
