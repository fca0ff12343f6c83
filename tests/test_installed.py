"""The wheel: its commands work from any folder, with the configurations it carries."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sedd_scale.commands import COMMANDS
from tests.repository import ROOT

SOURCES = ("sedd_scale", "configs", "slurm", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SMALL = ("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "training.steps=2")


class Installed:
    """What `pip install` left in a folder; its commands run elsewhere, without the repository."""

    def __init__(self, wheel: Path, folder: Path, elsewhere: Path) -> None:
        self.wheel, self.folder, self.elsewhere = wheel, folder, elsewhere

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        paths = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, self.folder / "bin/sedd-scale", *map(str, words)],
            cwd=self.elsewhere,
            env=paths,
            capture_output=True,
            text=True,
        )

    def check(self, *words: object) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in SOURCES:  # a build leaves files beside its sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        more = {"symlinks": True} if copy is shutil.copytree else {}
        copy(ROOT / name, source / name, **more)  # type: ignore[operator]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", work, source]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = work.glob("*.whl")
    folder, elsewhere = work / "packages", work / "elsewhere"
    into = ["install", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run([*pip, *into], check=True, capture_output=True)
    elsewhere.mkdir()
    shutil.rmtree(source)
    return Installed(wheel, folder, elsewhere)


def test_the_wheel_has_everything_and_nothing_else(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    data = [*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "slurm").glob("*.sh")]
    carried = {f"sedd_scale/{path.relative_to(ROOT)}" for path in data}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sedd_scale").rglob("*.py")}
    assert carried | modules | {"sedd_scale/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {"sedd_scale", *_metadata(names)}


def _metadata(names: set[str]) -> set[str]:
    return {name.partition("/")[0] for name in names if ".dist-info/" in name}


def test_every_command_is_there(installed: Installed) -> None:
    where = installed.check("--help")
    assert all(f"  {name} " in where for name in COMMANDS)
    program = "import sedd_scale; print(sedd_scale.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed.folder)}
    words = [sys.executable, "-c", program]
    found = subprocess.check_output(words, cwd=installed.elsewhere, env=environment, text=True)
    assert Path(found.strip()).is_relative_to(installed.folder)


def test_train_evaluate_generate_and_submit_from_another_folder(installed: Installed) -> None:
    prepare = ("--tokenizer", "bytes", "--block-length", 16, "--valid-fraction", 0.5)
    for number in range(8):
        (installed.elsewhere / f"{number}.txt").write_text(f"Line {number} of this text.\n" * 20)
    installed.check("prepare_data", "--input", "[0-9].txt", *prepare, "--output", "data")
    run = ("configs/runs/tiny.yaml", "--run-dir", "run", "data.path=data", *SMALL)
    installed.check("train", *run)
    bound = installed.check("eval_ppl", "--checkpoint", "run", "--data", "data", "--json")
    assert json.loads(bound)["kind"] == "bound"
    drawn = ("--num-samples", 1, "--length", 16, "--steps", 4)
    installed.check("generate", "--checkpoint", "run", *drawn, "--output", "samples.jsonl")
    assert (installed.elsewhere / "samples.jsonl").read_text().count("\n") == 1
    job = installed.check("submit", *run, "--gpus", 1, "--cpu", "--dry-run")
    assert "sedd_scale/slurm/launch.sh" in job


def test_a_file_that_exists_comes_before_the_shipped_one(installed: Installed) -> None:
    mine = installed.elsewhere / "configs/runs/tiny.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("training: {steps: 0}\n")
    done = installed.run("plan", "configs/runs/tiny.yaml", "--vocab-size", 9, "--block-length", 8)
    assert done.returncode == 2 and "training.steps=0" in done.stderr
    mine.unlink()
    installed.check("plan", "configs/runs/tiny.yaml", "--vocab-size", 9, "--block-length", 8)
    done = installed.run("train", "configs/runs/tyni.yaml", "--run-dir", "gone")
    assert done.returncode == 2 and "configs/runs/tiny.yaml" in done.stderr
    assert done.stderr.count("\n") == 1 and not (installed.elsewhere / "gone").exists()
