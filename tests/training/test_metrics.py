"""metrics.jsonl holds one history; the console says it in a line; wandb never stops a run."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.config import LoggingConfig
from sedd_scale.training.metrics import (
    MetricsLog,
    format_count,
    format_duration,
    format_training_line,
)


def line(step: int) -> dict[str, Any]:
    return {
        "loss": 4.0 + step,
        "grad_norm": 0.93,
        "lr": 1e-3,
        "tokens": 100 * step,
        "tokens_per_second": 12_345.0,
        "step_ms": 162.0,
    }


def record(run_dir: Path, steps: range, resumed_step: int | None = None, **options: Any) -> str:
    stream = io.StringIO()
    log = MetricsLog(
        run_dir,
        options.pop("config", LoggingConfig()),
        is_main=True,
        total_steps=2000,
        resumed_step=resumed_step,
        stream=stream,
        **options,
    )
    for step in steps:
        log.training(step, **line(step))
    log.validation(steps[-1], nats_per_token=4.5, stderr=0.01)
    log.close()
    return stream.getvalue()


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_json_object_a_line(tmp_path: Path) -> None:
    console = record(tmp_path, range(10, 40, 10))
    found = lines(tmp_path)
    guarded = {"loss_z": None, "grad_norm_z": None, "skipped_steps": 0}
    assert found[:3] == [{"step": step, **line(step), **guarded} for step in (10, 20, 30)]
    assert found[3] == {"step": 30, "valid_nats_per_token": 4.5, "valid_stderr": 0.01}
    assert len(console.splitlines()) == 4
    assert "\x1b" not in console


def test_a_resume_keeps_one_history(tmp_path: Path) -> None:
    record(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 4.')  # a crash in the middle of a line
    record(tmp_path, range(5, 10), resumed_step=4)
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    record(tmp_path, range(1, 3))
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, LoggingConfig(), is_main=True, total_steps=5, stream=io.StringIO())
    log.training(1, **{**line(1), "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    (found,) = lines(tmp_path)
    assert found["loss"] is None and found["grad_norm"] is None and found["lr"] == 1e-3


def test_other_processes_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = MetricsLog(
        tmp_path, LoggingConfig(wandb="online"), is_main=False, total_steps=5, stream=stream
    )
    log.training(1, **line(1))
    log.validation(1, nats_per_token=1.0, stderr=0.1)
    log.advance(1)
    log.say("hello")
    log.close()
    assert not list(tmp_path.iterdir()) and not stream.getvalue()


def test_a_terminal_has_a_bar_below_the_lines(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    log = MetricsLog(tmp_path, LoggingConfig(), is_main=True, total_steps=8, stream=stream)
    for step in range(1, 9):
        log.advance(step)
    log.training(8, **line(8))
    log.close()
    assert "8/8" in stream.getvalue() and "nats/token" in stream.getvalue()


def test_the_console_line() -> None:
    values = {**line(0), "loss": 4.8123}
    assert format_training_line(120, 1307, values) == (
        "step 120/1307  loss 4.812 nats/token  |g| 0.93  lr 1.0e-03  12.3k tokens/s  "
        "162 ms/step  eta 3m12s"
    )


def test_counts_and_durations() -> None:
    counts = [0, 7.25, 42, 999, 1000, 12_345, 999_600, 4.56e6, 3e9, 5e12]
    assert [format_count(value) for value in counts] == [
        "0.00", "7.25", "42.0", "999", "1.00k", "12.3k", "1.00M", "4.56M", "3.00G", "5.0T",
    ]  # fmt: skip
    durations = [0, 41.4, 60, 192, 7500, 111_600, -3, float("inf")]
    assert [format_duration(value) for value in durations] == [
        "0s", "41s", "1m00s", "3m12s", "2h05m", "1d07h", "0s", "?",
    ]  # fmt: skip


class FakeRun:
    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], *, step: int) -> None:
        if self.fails_at == "log":
            raise ConnectionError("the network\nis gone")
        self.logged.append((step, values))

    def finish(self) -> None:
        if self.fails_at == "finish":
            raise KeyError("half a run")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, fails_at: str) -> list[dict[str, Any]]:
    """A wandb that fails at one call; the arguments of `init` are returned."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> FakeRun:
        calls.append(arguments)
        if fails_at == "init":
            raise Exception("no such project")
        return FakeRun(fails_at)

    def login(*, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify  # neither may keep a run waiting
        return fails_at != "key"

    module = types.SimpleNamespace(init=init, login=login, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


@pytest.mark.parametrize("fails_at", ["init", "log", "finish", "key", "import"])
def test_a_failing_wandb_warns_once_and_the_run_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails_at: str,
) -> None:
    fake_wandb(monkeypatch, fails_at)
    if fails_at == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    record(tmp_path, range(1, 6), config=LoggingConfig(wandb="online"))
    assert len(lines(tmp_path)) == 6
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith("warning: wandb could not ")


def test_a_wandb_that_hangs_at_the_end_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import threading

    fake_wandb(monkeypatch, "")
    monkeypatch.setattr("sedd_scale.training.metrics._WANDB_SECONDS", 0.05)
    monkeypatch.setattr(FakeRun, "finish", lambda _: threading.Event().wait(5))
    record(tmp_path, range(1, 3), config=LoggingConfig(wandb="online"))
    assert "could not finish" in capsys.readouterr().err


def test_a_resume_goes_on_in_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch, "")
    for wandb_name in (None, "mine"):
        config = LoggingConfig(wandb="online", wandb_name=wandb_name)
        record(tmp_path, range(1, 3), config=config, run_config={"a": 1})
    assert calls[0]["id"] == calls[1]["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert calls[0]["resume"] == "allow" and calls[0]["config"] == {"a": 1}
    assert [call["name"] for call in calls] == [tmp_path.name, "mine"]


def test_wandb_itself_works_offline(tmp_path: Path) -> None:
    """In a process of its own, as wandb leaves threads and hooks behind."""
    program = f"""
import io
from sedd_scale.config import LoggingConfig
from sedd_scale.training.metrics import MetricsLog
log = MetricsLog({str(tmp_path)!r}, LoggingConfig(wandb="offline"), is_main=True, total_steps=3)
for step in range(1, 4):
    log.training(
        step, loss=1.0, grad_norm=1.0, lr=1.0, tokens=1, tokens_per_second=1.0, step_ms=1.0
    )
log.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert (tmp_path / "wandb_id.txt").read_text().strip() in written.name
    assert b"tokens_per_second" in written.read_bytes()
    assert len(lines(tmp_path)) == 3
