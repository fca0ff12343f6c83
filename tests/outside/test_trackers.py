"""After a resume from an earlier step the history at Weights & Biases is what happened."""

import gzip
import http.server
import json
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sedd_scale.config import LoggingConfig
from sedd_scale.tracking.trackers import open_trackers, wandb_id
from tests.repository import ROOT

# Step and learning rate of two starts, the second from step 2.
FIRST = [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1)]
SECOND = [(3, 0.5), (4, 0.5), (5, 0.5)]


class Keeper(http.server.BaseHTTPRequestHandler):
    """Keeps histories as the service does: lines at an offset replace what stood there."""

    kept: dict[str, list[str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body or b"{}") if "json" in self.headers.get("content-type", "") else {}
        stream = re.search(r"/([^/]+)/file_stream$", self.path)
        answer: dict[str, Any] = {"data": self._answer(asked)}
        if stream:
            answer = {}
            for name, content in (asked.get("files") or {}).items():
                if name == "wandb-history.jsonl":
                    history = self.kept[stream[1]]
                    history[content["offset"] :] = content["content"]
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, name = asked.get("query", ""), (asked.get("variables") or {}).get("name", "run")
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": name, "displayName": name, "project": project, "config": "{}"}
        if "RunResumeStatus" in query:
            history = self.kept.get(name, [])
            counts = {"historyLineCount": len(history), "logLineCount": 0, "eventsLineCount": 0}
            tails = {"historyTail": json.dumps(history[-1:]), "eventsTail": "[]"}
            more = {"summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "tags": []}
            found = {**bucket, **counts, **tails, **more} if history else None
            return {"model": {**project, "bucket": found}}
        if "UpsertBucket" in query:
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "CreateRunFiles" in query:
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "e", "username": "e"}}
        return {}

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """The histories of a service that stands in for the real one, by the run's id."""
    pytest.importorskip("wandb")
    histories: dict[str, list[str]] = defaultdict(list)
    handler = type("Keeping", (Keeper,), {"kept": histories})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield histories
        server.shutdown()


def start(run_dir: Path, mode: str, numbers: list[tuple[int, float]], resumed: int | None) -> None:
    config = LoggingConfig(wandb=mode)
    (tracker,) = open_trackers(run_dir, config, {"resumed": resumed}, resumed_step=resumed)
    for step, lr in numbers:
        tracker.log(step, {"lr": lr})
    tracker.close(60.0)


def history(lines: list[str]) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["lr"]) for record in records if "lr" in record]


def test_online_a_second_history_goes_behind_the_first(
    tmp_path: Path, kept: dict[str, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, "online", FIRST, None)
    start(tmp_path, "online", SECOND, 2)
    assert [*kept] == [wandb_id(tmp_path)]
    assert history(kept[wandb_id(tmp_path)]) == FIRST + SECOND
    assert "warning" not in capfd.readouterr().err


def test_offline_starts_are_segments_that_all_arrive(
    tmp_path: Path, kept: dict[str, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, "offline", FIRST, None)
    start(tmp_path, "offline", SECOND, 2)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, folders)]
    for _ in range(2):  # once more changes nothing
        subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=100, check=True)
    assert sorted(map(history, kept.values())) == sorted([FIRST, SECOND])
    assert all(name.startswith(f"{wandb_id(tmp_path)}-") for name in kept)
    # A start online later, under the run's own id, takes the place of none.
    start(tmp_path, "online", [(6, 0.5)], 5)
    assert sorted(map(history, kept.values())) == sorted([FIRST, SECOND, [(6, 0.5)]])


@pytest.mark.parametrize("content", ["", "\n", "feed\0\0\0\0", "two words", "x" * 200])
def test_an_id_that_is_torn_is_made_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "wandb_id.txt").write_text(content)
    made = wandb_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", made)
    assert wandb_id(tmp_path) == made
