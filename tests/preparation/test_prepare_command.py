"""The command: it reports what it wrote, and each bad input is one line and leaves nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from sedd_scale.__main__ import main
from sedd_scale.data.shards import Dataset
from tests.data.corpus import make_texts, write_jsonl
from tests.data.file_server import serving
from tests.repository import ROOT


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "texts.jsonl", make_texts(40))


def run(source: Path | str, output: Path, *arguments: str) -> int:
    chosen = ["--input", str(source), "--output", str(output)]
    defaults = ["--tokenizer", "bytes", "--block-length", "64"]
    return main(["prepare_data", *chosen, *defaults, *arguments])


def test_as_a_process(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep/out"
    start = [sys.executable, "-m", "sedd_scale", "prepare_data", "--input", str(source), "--output"]
    done = subprocess.run(
        [*start, str(output), "--tokenizer", "bytes", "--block-length", "64"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str(output)
    assert done.stderr == ""
    assert len(Dataset(output).reader("train")) > 50
    again = subprocess.run(
        [*start, str(output), "--tokenizer", "bytes", "--block-length", "64"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2
    assert again.stdout == ""
    assert len(again.stderr.splitlines()) == 1
    assert "already holds a dataset; give another --output or remove it" in again.stderr


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "matches no file"),
        (b"", [], "is empty"),
        (b'{"text": "caf\xe9"}\n', [], "byte 0xe9 at offset 13 is not UTF-8"),
        (b'{"text": "a"}\n{"text"\n', [], "texts.jsonl:2 is not JSON"),
        (b'{"body": "a"}\n', [], "texts.jsonl:1 has no field 'text': name one with --field (body)"),
        (b'{"text": "a"}\n', [], "1 distinct document(s) are too few"),
        (b'{"text": "a"}\n{"text": "b"}\n', [], "the train split has 2 tokens, less than one"),
        (
            "good",
            ["--tokenizer", "sentencepiece", "--vocab-size", "30000"],
            "--vocab-size 30000 is too large for this text: give at most",
        ),
        ("good", ["--block-length", "9000"], "the valid split has"),
        ("good", ["--vocab-size", "300"], "--vocab-size 300 does not fit the bytes tokenizer"),
        ("good", ["--tokenizer", "gpt2"], "needs --tokenizer-path"),
        (
            "good",
            ["--tokenizer", "gpt2", "--tokenizer-path", "x"],
            "x does not exist",
        ),
        ("good", ["--tokenizer", "sentencepiece", "--tokenizer-path", "x"], "x does not exist"),
        ("good", ["--tokenizer-path", "x"], "leave --tokenizer-path out"),
        ("good", ["--block-length", "9999999999999"], "is too large: give at most 134217728"),
        ("good", ["--processes", "100000"], "is too many here"),
        ("good", ["--valid-fraction", "1"], "--valid-fraction 1.0 is not in [0, 1)"),
        ("good", ["--valid-fraction", "0.5", "--test-fraction", "0.5"], "leave nothing to train"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | str | None,
    arguments: list[str],
    message: str,
) -> None:
    source = tmp_path / "texts.jsonl"
    if content == "good":
        write_jsonl(source, make_texts(40))
    elif isinstance(content, bytes):
        source.write_bytes(content)
    assert run(source, tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    assert not (tmp_path / "out").exists()


HOLDER = """
import sys, time
from pathlib import Path
from sedd_scale.files.folder_lock import lock_folder

stream = lock_folder(Path(sys.argv[1]), option="--output", name="unfinished.lock")
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_preparation_at_once_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        assert run(source, output) == 2
        assert f"is in use: process {first.pid}" in capsys.readouterr().err
        first.kill()
    assert [path.name for path in output.iterdir()] == ["unfinished.lock"]
    assert run(source, output) == 0
    assert not list(output.glob("unfinished*"))


def test_nothing_of_another_is_written_over(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.write_text("a file")
    assert run(source, output) == 2
    assert "is a file" in capsys.readouterr().err
    assert output.read_text() == "a file"
    output.unlink()
    (output / "tokenizer").mkdir(parents=True)
    (output / "tokenizer/tokenizer.json").write_text("somebody's")
    assert run(source, output) == 2
    assert "is not empty (it holds tokenizer)" in capsys.readouterr().err
    assert (output / "tokenizer/tokenizer.json").read_text() == "somebody's"


def test_inspect_shows_and_verifies(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(source, output, "--dedupe", "--blocks-per-shard", "40") == 0
    prepared = capsys.readouterr().out
    assert "0 duplicate documents dropped" in prepared
    assert (
        main(["prepare_data", "inspect", str(output), "--num-blocks", "2", "--characters", "30"])
        == 0
    )
    shown = capsys.readouterr().out
    for line in prepared.splitlines()[:-2]:
        assert line in shown
    assert shown.count("--- train block") == 2
    text = make_texts(40)[0][:20]
    assert text in shown or "Document" in shown
    assert shown.rstrip().endswith("every SHA-256 is right")
    with serving(output) as server:
        assert (
            main(["prepare_data", "inspect", server.url, "--cache-dir", str(tmp_path / "cache")])
            == 0
        )
    assert "every SHA-256 is right" in capsys.readouterr().out
    shard = output / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["prepare_data", "inspect", str(output)]) == 2
    assert "train-000001.tar is damaged (its SHA-256" in capsys.readouterr().err
