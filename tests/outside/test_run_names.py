"""A run directory may have any name, and a checkpoint be named in any way."""

import json
import shutil
from pathlib import Path

import pytest

from sedd_scale import load_pretrained
from sedd_scale.__main__ import main
from sedd_scale.checkpoint.directory import find_checkpoint, run_of
from sedd_scale.interop.convert import convert
from sedd_scale.interop.fingerprint import checkpoint_digest, checkpoint_fingerprint
from tests.datasets import dataset_of_words
from tests.interop.tiny_checkpoints import write_checkpoint

NAMES = ("step-2", "step-2-sft", "step-2.tmp", "step-2.old", "latest", "checkpoints", "best.ckpt")
WAYS = ("", "checkpoints", "checkpoints/latest", "checkpoints/step-0", "checkpoints/step-0/")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def named(made: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "runs" / request.param
    shutil.copytree(made, path)
    return path


@pytest.mark.parametrize("named", NAMES, indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_any_name_of_a_run_opens_its_checkpoint(named: Path, way: str) -> None:
    assert find_checkpoint(named / way) == named / "checkpoints/step-0"
    assert run_of(named / way) == named


@pytest.mark.parametrize(
    ("named", "way"),
    [("step-2", ""), ("latest", "checkpoints/latest"), ("step-2-sft", "checkpoints/step-0")],
    indirect=["named"],
)
def test_every_command_takes_every_name(
    named: Path, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(named / way)
    held = tmp_path / "held.txt"
    held.write_text("some text to be read again and again. " * 4)
    (named / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "grad_norm": 1, "lr": 1}\n')
    short = ["--draws", "2", "--max-blocks", "1", "--json"]
    assert main(["eval_ppl", "--checkpoint", path, "--data", str(held), *short]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint_fingerprint"] == checkpoint_fingerprint(named)
    output = str(tmp_path / "out.jsonl")
    drawn = ["--length", "8", "--steps", "2", "--output", output]
    assert main(["generate", "--checkpoint", path, *drawn]) == 0
    assert main(["convert_ckpt", "inspect", path]) == 0
    assert main(["convert_ckpt", "verify", path, str(named), "--tolerance", "0"]) == 0
    convert("native", "sedd-hf", path, tmp_path / "exported")
    assert load_pretrained(path).block_length == 32
    assert main(["plot_run", path, "--output", str(tmp_path / "page.html")]) == 0
    tensorboard = "logging:\n  tensorboard: true\n"
    (named / "config.yaml").write_text(tensorboard)
    assert main(["samples", output, "--track", path]) == 0
    assert list((named / "tensorboard").iterdir())
    assert checkpoint_digest(named / way) == checkpoint_digest(named)
    assert capsys.readouterr().err.count("error") == 0


def test_a_copied_or_linked_checkpoint_opens_under_its_new_name(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "checkpoints/step-0", tmp_path / "best")
    assert find_checkpoint(tmp_path / "best") == tmp_path / "best"
    (tmp_path / "link").symlink_to(made / "checkpoints/step-0")
    assert find_checkpoint(tmp_path / "link") == tmp_path / "link"
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").unlink()
    (tmp_path / "run/checkpoints/latest").symlink_to("step-0")
    assert find_checkpoint(tmp_path / "run").name == "step-0"
    assert load_pretrained(tmp_path / "run/checkpoints/latest").block_length == 32


def test_a_folder_of_runs_is_no_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "step-7")
    assert main(["convert_ckpt", "inspect", str(tmp_path / "step-7")]) == 0
    assert main(["convert_ckpt", "inspect", str(tmp_path)]) == 2


def test_training_within_a_run_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset_of_words(tmp_path / "data", 8, block_length=32)
    config = tmp_path / "run.yaml"
    config.write_text(f"data:\n  path: {data}\ntraining:\n  global_batch: 8\n  micro_batch: 8\n")
    for way in WAYS[1:]:
        assert main(["train", str(config), "--run-dir", str(made / way)]) == 2
        assert f"is within the run {made}: give that" in capsys.readouterr().err
    assert {path.name for path in (made / "checkpoints").iterdir()} == {"latest", "step-0"}


@pytest.mark.parametrize("text", ["step-" + "9" * 5000, "step-\u0663", "step-1\0\0", ""])
def test_a_latest_that_names_nothing_is_passed_over(made: Path, text: str, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text(text, encoding="utf-8")
    assert find_checkpoint(tmp_path / "run").name == "step-0"
    assert find_checkpoint(tmp_path / "run/checkpoints/latest").name == "step-0"
