"""Results outlive what their last line meets: an output that lacks a character, a full disk."""

import io
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sedd_scale.__main__ import main
from sedd_scale.errors import DataError
from sedd_scale.files.atomic import write_atomically
from sedd_scale.generation.prompts_file import read_prompt_lines
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import ROOT

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
TEXT = "naïve “字” 😀 – text of some length. "


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends")
    write_checkpoint(folder / "run")
    (folder / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    tokens = list(TEXT.encode())
    rows = [{"id": "字", "text": TEXT, "tokens": tokens}, {"id": 1, "text": "b", "tokens": [1, 2]}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--tokenizer", "bytes", "--block-length", "256", "--valid-fraction", "0"]
    words += ["--input", str(folder / "text.txt"), "--output", str(folder / "data")]
    assert main(["prepare_data", *words]) == 0
    return folder


@contextmanager
def output_is(path: Path, monkeypatch: pytest.MonkeyPatch, *, at_once: bool) -> Iterator[None]:
    """Standard output is a file that takes nothing, written at once or at the end."""
    stream = io.TextIOWrapper(
        path.open("wb", buffering=0 if at_once else -1), write_through=at_once
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield
    stream.close()  # as Python does at its end


def evaluate(work: Path, *words: str) -> list[str]:
    few = ["--draws", "2", "--max-blocks", "2", "--block-length", "16"]
    return [
        "eval_ppl",
        "--checkpoint",
        str(work / "run"),
        "--data",
        str(work / "text.txt"),
        *few,
        *words,
    ]


@needs_full
@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_disk_takes_no_evaluation(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_once: bool,
) -> None:
    with output_is(FULL, monkeypatch, at_once=at_once):
        assert main(evaluate(work)) == 2
    error = capsys.readouterr().err
    shown = next(line for line in error.splitlines() if line.startswith("{"))
    assert json.loads(shown)["blocks"] == 2
    assert "standard output cannot be written: No space left on device" in error
    with output_is(FULL, monkeypatch, at_once=at_once):
        assert main(evaluate(work, "--output", str(tmp_path / "found.json"))) == 2
    assert json.loads((tmp_path / "found.json").read_text()) == {
        **json.loads(shown),
        "seconds": json.loads((tmp_path / "found.json").read_text())["seconds"],
    }
    assert main(evaluate(work, "--output", str(tmp_path / "found.json"))) == 2
    assert "found.json exists already" in capsys.readouterr().err


def test_a_closed_output_is_refused_before_the_work(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(evaluate(work)) == 2
    assert main(["samples", str(work / "samples.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "would be lost: give --output FILE.json" in error
    assert "would be lost: give --report FILE.json" in error
    assert main(evaluate(work, "--output", str(tmp_path / "found.json"))) == 0
    assert json.loads((tmp_path / "found.json").read_text())["blocks"] == 2


@needs_full
@pytest.mark.parametrize("at_once", [True, False])
def test_files_are_written_before_a_full_output_is_met(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_once: bool,
) -> None:
    report, drawn = tmp_path / "r.json", tmp_path / "drawn.jsonl"
    words = ["--checkpoint", str(work / "run"), "--length", "8", "--steps", "2"]
    words += ["--output", str(drawn), "--trace", str(tmp_path / "trace.html")]
    prepared = ["--input", str(work / "text.txt"), "--output", str(tmp_path / "data")]
    prepared += ["--tokenizer", "bytes", "--block-length", "16", "--valid-fraction", "0"]
    with output_is(FULL, monkeypatch, at_once=at_once):
        assert main(["samples", str(work / "samples.jsonl"), "--report", str(report)]) == 2
    with output_is(FULL, monkeypatch, at_once=at_once):
        assert main(["generate", *words]) == 2
    with output_is(FULL, monkeypatch, at_once=at_once):
        assert main(["prepare_data", *prepared]) == 2
    error = capsys.readouterr().err
    assert error.count("standard output cannot be written: No space left on device") == 3
    assert json.loads(report.read_text())["samples"] == 2
    assert len(drawn.read_text().splitlines()) == 1
    assert json.loads((tmp_path / "drawn.report.json").read_text())["samples"] == 1
    assert "<html" in (tmp_path / "trace.html").read_text()
    assert (tmp_path / "data" / "index.json").is_file()


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "latin-1", "cp1252", "the C locale"],
)
def test_a_character_that_an_output_lacks_is_replaced(
    work: Path, environment: dict[str, str]
) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "sedd_scale", "prepare_data", "inspect", str(work / "data")],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    assert b"text of some length." in finished.stdout and b"?" in finished.stdout
    assert b"every SHA-256 is right" in finished.stdout


def test_a_preparation_on_a_full_disk_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 3000, encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, most in (("whole", before[0]), ("full", 50_000), ("full", before[0])):
        words = ["--tokenizer", "bytes", "--block-length", "64", "--valid-fraction", "0"]
        words += ["--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / name)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            code = main(["prepare_data", *words])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert code == (2 if most == 50_000 else 0)
    error = capsys.readouterr().err
    assert f"--output {tmp_path / 'full'} cannot be written: File too large; mend that" in error
    one, other = ((tmp_path / name / "index.json").read_bytes() for name in ("whole", "full"))
    assert one == other


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"result\.json") as raised:
            write_atomically(tmp_path / "result.json", b"x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path / "result.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rows",
    [
        [{"id": "a"}, {"id": "a"}],
        [{"id": "a", "num_samples": 2}, {"id": "a-1"}],
        [{"id": "a-0"}, {"id": "a", "num_samples": 2}],
        [{"id": 1}, {"id": "1"}],
        [{"id": 2}, {}],
        [{"num_samples": 3}, {"id": "1-2"}],
        [{"id": "a", "num_samples": 2}, {"id": "a", "num_samples": 3}],
    ],
    ids=lambda rows: json.dumps(rows),
)
def test_prompts_whose_samples_share_a_name_are_refused(
    tmp_path: Path, rows: list[dict[str, object]]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prefix": "x", **row}) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"p\.jsonl:2: .* is also that of line 1"):
        read_prompt_lines(path)
    skipped: list[DataError] = []
    assert len(read_prompt_lines(path, on_bad=skipped.append)) == len(skipped) == 1


@pytest.mark.parametrize(
    "ends",
    ["2>&-", pytest.param("2>/dev/full", marks=needs_full)],
    ids=["closed", "full"],
)
@pytest.mark.parametrize("command", ["eval_ppl", "prepare_data"])
def test_messages_that_nobody_takes_end_no_work(
    work: Path, tmp_path: Path, command: str, ends: str
) -> None:
    prepared = ["prepare_data", "--input", str(work / "text.txt"), "--output", str(tmp_path / "d")]
    prepared += ["--tokenizer", "bytes", "--block-length", "16", "--valid-fraction", "0"]
    words = prepared if command == "prepare_data" else evaluate(work)
    for wrong, code in (([], 0), (["--members", ".x"], 2)):
        line = shlex.join([sys.executable, "-m", "sedd_scale", *words, *wrong])
        finished = subprocess.run(
            ["sh", "-c", f"{line} {ends}"], cwd=ROOT, stdout=subprocess.PIPE, timeout=100
        )
        assert finished.returncode == code
        assert not code or not finished.stdout
        assert b"note:" not in finished.stdout, "messages are no part of a result"


def test_a_locale_of_ascii_ends_no_work(work: Path) -> None:
    line = [sys.executable, "-m", "sedd_scale", *evaluate(work)]
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    finished = subprocess.run(
        line, env={**os.environ, **ascii_only}, cwd=ROOT, capture_output=True, timeout=100
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1])["blocks"] == 2


@pytest.mark.parametrize("command", ["eval_ppl", "generate"])
def test_an_output_that_no_reader_would_open_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    drawn = ["generate", "--checkpoint", str(work / "run"), "--length", "8", "--steps", "2"]
    words = drawn if command == "generate" else evaluate(work)
    assert main([*words, "--output", str(tmp_path / "o.jsonl.gz")]) == 2
    assert "o.jsonl.gz is not compressed when written: leave .gz out" in capsys.readouterr().err


@needs_full
@pytest.mark.parametrize("ends", ["> /dev/full", ">&-", "| true"])
def test_training_outlives_its_console(work: Path, tmp_path: Path, ends: str) -> None:
    few = ["training.steps=3", "logging.every=1", "training.valid_every=0"]
    tiny = ["model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "model.cond_dim=8"]
    batch = ["training.global_batch=2", "training.micro_batch=2", f"data.path={work / 'data'}"]
    words = ["train", "configs/runs/tiny.yaml", "--run-dir", str(tmp_path / "run")]
    line = shlex.join([sys.executable, "-m", "sedd_scale", *words, *few, *tiny, *batch])
    finished = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} {ends}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert finished.returncode == 0, finished.stderr
    said = finished.stderr.count("standard output takes no more; training goes on")
    assert said == (ends != ">&-")
    assert (tmp_path / "run/checkpoints/step-3").is_dir()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


def test_a_result_whose_file_cannot_be_written_is_printed(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = str(tmp_path / "found.json")
    for words in (
        evaluate(work, "--output", report),
        ["samples", str(work / "samples.jsonl"), "--report", report],
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            assert main(words) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        printed = capsys.readouterr()
        assert "found.json: File too large" in printed.err
        assert "nats/token" in printed.out or "distinct" in printed.out


@needs_full
def test_what_standard_output_does_not_take_may_follow_on_standard_error() -> None:
    program = (
        "from sedd_scale.cli import outlive_outputs, outlive_stdout\n"
        "outlive_outputs(); outlive_stdout('the rest follows here', on_stderr=True)\n"
        "print('a table'); print('its second line')"
    )
    with FULL.open("wb") as full:
        finished = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert finished.returncode == 0
    told = "the rest follows here (No space left on device)"
    assert finished.stderr.splitlines() == [told, "a table", "its second line"]
