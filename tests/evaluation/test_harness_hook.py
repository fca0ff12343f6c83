"""lm_eval's table of models gets ours where the line of `lm-eval on` has run, and not elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_scale.errors import ConfigError
from sedd_scale.evaluation import harness_hook
from tests.repository import ROOT

# What of the harness the hook touches.
REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        self[name] = target
model_registry = Registry()
"""
MODELS = """
from lm_eval.api.registry import model_registry
model_registry.register("hf", target="lm_eval.models.huggingface:HFLM")
"""


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "site" / "sedd_scale_lm_eval.pth"
    path.parent.mkdir()
    monkeypatch.setattr(harness_hook, "line_file", lambda: path)
    return path


def models_known(tmp_path: Path, line: str, *, path: str = str(ROOT)) -> list[str]:
    """The names in the harness's table, in a process that runs the line as it starts."""
    for name, text in (("api/registry.py", REGISTRY), ("models/__init__.py", MODELS)):
        file = tmp_path / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    program = "import lm_eval.models as m; print(*m.model_registry.items(), sep='\\n')"
    finished = subprocess.run(
        [sys.executable, "-S", "-c", line + program],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{path}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return finished.stdout.splitlines()


def test_the_line_makes_the_model_known_until_it_is_taken_out(line: Path, tmp_path: Path) -> None:
    assert len(models_known(tmp_path, "")) == 1
    assert harness_hook.switch(True).startswith(f"wrote {line}: lm_eval --model sedd_scale works")
    text = line.read_text()
    assert text.startswith("import ") and text.count("\n") == 1, "site runs no other line"
    theirs, ours = models_known(tmp_path, text)
    assert "'hf'" in theirs
    assert ours == "('sedd_scale', 'sedd_scale.evaluation.harness:SeddScaleLM')"
    # Where the package is gone, Python starts all the same.
    assert len(models_known(tmp_path, text, path=str(tmp_path))) == 1
    for _ in range(2):
        assert "is not there" in harness_hook.switch(False)
        assert not line.exists()


def test_an_environment_that_cannot_be_written_is_named(line: Path) -> None:
    line.parent.rmdir()
    with pytest.raises(ConfigError, match=r"lm_eval\.pth cannot be written .*harness instead"):
        harness_hook.switch(True)
