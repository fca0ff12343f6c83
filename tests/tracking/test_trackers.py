"""Trackers: what they are given arrives in order; what fails or blocks holds nothing up."""

import http.server
import json
import os
import re
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.__main__ import main
from sedd_scale.config import Config, LoggingConfig
from sedd_scale.tracking.trackers import TrackerProcess, open_trackers
from tests.repository import ROOT

GOOD, BAD = "tests.tracking.bad_trackers:Good", "tests.tracking.bad_trackers:Bad"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_everything_arrives_in_order_and_numbers_that_are_none_are_null(tmp_path: Path):
    said: list[str] = []
    tracker = TrackerProcess("good", GOOD, {"path": str(tmp_path / "log")}, warn=said.append)
    for step in range(100):
        tracker.log(step, {"loss": float("nan") if step == 7 else 1.5})
    tracker.log_samples(100, [{"text": "a"}, {"text": "b"}])
    tracker.close()
    found = written(tmp_path / "log")
    assert [line["step"] for line in found] == [*range(101), -1]
    assert found[7]["loss"] is None and found[100]["samples"] == 2
    assert not said and tracker.dropped == 0


@pytest.mark.parametrize("at", ["start", "log", "finish"])
@pytest.mark.parametrize("how", ["raise", "die", "block"])
def test_a_bad_tracker_costs_nothing_and_is_named(tmp_path: Path, at: str, how: str):
    said: list[str] = []
    arguments = {"path": str(tmp_path / "log"), "at": at, "how": how}
    tracker = TrackerProcess("service", BAD, arguments, warn=said.append, queued=50)
    begun = time.monotonic()
    for step in range(20):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - begun < 1.0
    begun = time.monotonic()
    tracker.close(1.0 if how == "block" else None)
    assert time.monotonic() - begun < (10.0 if how == "block" else 30.0)
    assert len(said) == 1 and said[0].startswith("warning: service "), said
    assert "metrics.jsonl has everything" in said[0] and "\n" not in said[0]
    if how == "raise":
        assert f"could not {at}" in said[0]
        assert "(ConnectionError: the network is gone)" in said[0]
    elif how == "die":
        assert "SIGKILL" in said[0]
    else:
        assert "did not end within 1 s" in said[0]
    tracker.log(99, {"loss": 1.0})  # as a run that goes on would


def test_what_a_blocked_tracker_is_too_slow_for_is_dropped_counted_and_said(tmp_path: Path):
    said: list[str] = []
    arguments = {"path": str(tmp_path / "log"), "at": "start", "how": "block"}
    tracker = TrackerProcess("service", BAD, arguments, warn=said.append, queued=10)
    begun = time.monotonic()
    # A pipe takes some of them.
    for step in range(3000):
        tracker.log(step, {"loss": 1.0, "text" * 20: 2.0})
    assert time.monotonic() - begun < 2.0
    tracker.close(0.5)
    assert tracker.dropped > 1000
    assert len(said) == 3
    assert "10 records wait for it: further ones are dropped" in said[0]
    assert f"lacks {tracker.dropped} records" in said[2]


def test_ids_stay_and_nothing_starts_that_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    started: list[tuple[str, dict[str, Any]]] = []

    def note(name: str, factory: str, arguments: dict[str, Any]) -> str:
        started.append((name, arguments))
        return name

    monkeypatch.setattr("sedd_scale.tracking.trackers.TrackerProcess", note)
    assert open_trackers(tmp_path, LoggingConfig(), {}, resumed_step=None) == []
    assert not list(tmp_path.iterdir())
    for name in (None, "mine"):
        config = LoggingConfig(wandb="online", wandb_name=name, tensorboard=True)
        open_trackers(tmp_path, config, {"a": 1}, resumed_step=3)
    first, board, second, _ = (arguments for _, arguments in started)
    assert first["run_id"] == second["run_id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert first["name"] == tmp_path.name and second["name"] == "mine"
    assert first["watched_pid"] == os.getpid() and first["config"] == {"a": 1}
    assert board["resumed_step"] == 3


def test_wandb_offline_holds_numbers_samples_config_and_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = LoggingConfig(wandb="offline")
    (tracker,) = open_trackers(tmp_path, config, {"seed": 1234567}, resumed_step=None)
    tracker.log(1, {"tokens_per_second": 1.0})
    tracker.log_samples(1, [{"text": "once upon a time"}])
    tracker.close(120.0)
    assert capsys.readouterr().err == ""
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    content = record.read_bytes()
    assert (tmp_path / "wandb_id.txt").read_text().strip() in record.name
    for part in (b"tokens_per_second", b"1234567", b"samples"):
        assert part in content, part
    with tarfile.open(folder / "files" / "code.tar.gz") as code:
        assert {
            "sedd_scale/diffusion/score_entropy.py",
            "sedd_scale/commands/train.py",
            "sedd_scale/configs/runs/tiny.yaml",
        } <= {*code.getnames()}


def test_samples_are_sent_to_no_run_without_trackers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    step = tmp_path / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    (step / "meta.json").write_text('{"format": "sedd_scale", "step": 3}')
    (tmp_path / "samples.jsonl").write_text('{"id": "0", "tokens": [1], "text": "a"}\n')
    words = [str(tmp_path / "samples.jsonl"), "--track", str(tmp_path)]
    assert main(["samples", *words]) == 2
    assert "error: " in capsys.readouterr().err
    assert main(["samples", *words, "--show-trace"]) == 2
    assert "--track goes with the report" in capsys.readouterr().err


class Service(http.server.BaseHTTPRequestHandler):
    """Answers what a client of Weights & Biases asks with nothing, and notes it."""

    asked: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append(f"{self.path} {body.decode(errors='replace')}")
        data: dict[str, Any] = {}
        if '"operationName":"CreateRunFiles"' in self.asked[-1]:
            data["createRunFiles"] = {"runID": "run", "uploadHeaders": [], "files": []}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[tuple[int, list[str]]]:
    asked: list[str] = []
    handler = type("Noting", (Service,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


def test_wandb_online_sends_what_it_is_given_under_the_runs_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: tuple[int, list[str]]
):
    port, asked = service
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    (tmp_path / "wandb_id.txt").write_text("feedbeef\n")  # of a start before
    config = LoggingConfig(wandb="online")
    (tracker,) = open_trackers(tmp_path, config, {"seed": 1234567}, resumed_step=5)
    tracker.log(6, {"valid_nats_per_token": 4.5})
    tracker.close(30.0)
    everything = "\n".join(asked)
    assert re.search(r"RunResumeStatus.*feedbeef", everything)
    assert re.search(r"UpsertBucket.*feedbeef", everything) and "1234567" in everything
    assert re.search(r"feedbeef/file_stream.*valid_nats_per_token", everything)


def test_wandb_with_a_network_that_never_answers_is_left_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)  # connections are made, and nobody reads
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        config = LoggingConfig(wandb="online")
        begun = time.monotonic()
        (tracker,) = open_trackers(tmp_path, config, {}, resumed_step=None)
        for step in range(100):
            tracker.log(step, {"loss": 1.0})
        assert time.monotonic() - begun < 2.0
        tracker.close(2.0)
        assert time.monotonic() - begun < 10.0
    assert "warning: wandb did not end within 2 s and is left" in capsys.readouterr().err


def test_tensorboard_reads_what_was_written_and_a_resume_hides_what_came_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("tensorboard", reason="of the extra `tensorboard`, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard=True)
    for resumed, steps in ((None, (1, 2, 3)), (1, (2,))):
        (tracker,) = open_trackers(tmp_path, config, {"seed": 1}, resumed_step=resumed)
        for step in steps:
            tracker.log(step, {"loss": 10.0 * step + (resumed or 0), "mfu": float("nan")})
        tracker.log(steps[-1], {"valid_nats_per_token": 4.5})
        tracker.log_samples(steps[-1], [{"text": "once"}])
        tracker.close(120.0)
    assert capsys.readouterr().err == ""
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("training/loss")] == [(1, 10.0), (2, 21.0)]
    assert events.Scalars("validation/valid_nats_per_token")[-1].value == 4.5
    assert "samples/0/text_summary" in events.Tags()["tensors"]
