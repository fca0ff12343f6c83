"""The command: its table, its line of JSON, and one line an error."""

import json
import math
from pathlib import Path

import pytest

from sedd_scale.__main__ import main
from sedd_scale.preparation.prepare import prepare
from sedd_scale.tokenizers.alphabets import Text8Tokenizer
from tests.data.corpus import make_texts, write_jsonl
from tests.interop.tiny_checkpoints import write_checkpoint

KEYS = {
    "nats_per_token",
    "bits_per_token",
    "bits_per_char",
    "bits_per_byte",
    "perplexity",
    "stderr",
    "ci95",
    "draws",
    "blocks",
    "tokens",
    "dropped_tokens",
    "protocol",
    "data_fingerprint",
    "checkpoint_fingerprint",
    "dataset",
    "detokenizer",
    "documents",
    "wrap",
    "remainder",
    "seconds",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint over bytes, text8's, and the same text as JSONL and as datasets of both."""
    folder = tmp_path_factory.mktemp("eval")
    write_checkpoint(folder / "run")
    texts = write_jsonl(folder / "texts.jsonl", make_texts(12))
    for kind in ("bytes", "text8"):
        prepare(
            [str(texts)],
            output=folder / kind,
            block_length=32,
            tokenizer=kind,
            valid_fraction=0.5,
        )
    write_checkpoint(folder / "letters", tokenizer=Text8Tokenizer())
    return folder


def run(work: Path, *arguments: object, checkpoint: str = "run") -> int:
    chosen = ["--checkpoint", str(work / checkpoint), *map(str, arguments)]
    return main(["eval_ppl", *chosen])


def test_table_and_json(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(work, "--data", work / "bytes", "--max-blocks", 4, "--draws", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report.keys() >= KEYS
    assert report["blocks"] == 4 and report["tokens"] == 128 and report["draws"] == 4
    assert report["perplexity"] == pytest.approx(math.exp(report["nats_per_token"]))
    # Random weights know nothing: near ln 257 nats a byte.
    assert 4.5 < report["nats_per_token"] < 9.0
    bits = report["bits_per_token"]
    assert report["bits_per_char"] > report["bits_per_byte"] > bits
    assert f"{report['nats_per_token']:.4f}" in "\n".join(lines[:-1])

    assert run(work, "--data", work / "bytes", "--max-blocks", 4, "--draws", 4, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    again = json.loads(line)
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


def test_the_paper_protocol_counts_the_diffusion_term_alone(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", work / "texts.jsonl", "--max-blocks", 2, "--protocol", "paper")
    assert run(work, *arguments, "--draws", 8, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["protocol"] == "paper" and report["terms"]["prior"] is None
    assert report["nats_per_token"] == pytest.approx(report["terms"]["diffusion"])
    assert report["replicates"] == 8


@pytest.mark.parametrize(
    "checkpoint, arguments, message",
    [
        ("run", ("--data", "text8"), "made with another tokenizer"),
        ("letters", ("--data", "bytes"), "made with another tokenizer"),
        ("run", ("--data", "none.txt"), "does not exist"),
        ("nowhere", ("--data", "bytes"), "nowhere does not exist"),
        ("run", ("--data", "bytes", "--remainder", "pad"), "whose blocks are made"),
        ("run", ("--data", "texts.jsonl", "--seed", "1", "--resume", "kept"), "another seed"),
        ("run", ("--data", "bytes", "--draws", "1"), "give at least 2"),
        ("run", ("--data", "bytes", "--tensor", "2"), "cannot be shared"),
        (
            "run",
            ("--data", "bytes", "--resume", "texts.jsonl"),
            "--resume texts.jsonl is not a dir",
        ),
        ("run", ("--data", "bytes", "--tokenizer", "letters-tokenizer"), "is not the tokenizer"),
    ],
)
def test_bad_input_is_one_line(
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(work)
    if "kept" in arguments:
        assert run(work, *arguments[:2], "--max-blocks", 2, "--resume", "kept", "--json") == 0
        arguments = (*arguments, "--max-blocks", "2")
        capsys.readouterr()
    assert run(work, *arguments, checkpoint=checkpoint) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line
