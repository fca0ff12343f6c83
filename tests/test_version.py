"""Releases of DeepSpeed and Megatron-core that were not tested are refused at import."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_scale.errors import InstallationError
from sedd_scale.version import TESTED, require_tested
from tests.repository import ROOT


@pytest.mark.parametrize("package", TESTED)
def test_another_release_is_named_with_the_fix(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tested(package)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    with pytest.raises(InstallationError, match=rf"{package} .* needed and 9\.9\.9 is installed"):
        require_tested(package)


def test_setup_and_constraints_ask_for_what_is_tested() -> None:
    for file in ("setup.py", "constraints.txt"):
        text = (ROOT / file).read_text()
        for package, releases in TESTED.items():
            assert f"{package}=={releases[-1]}" in text, (file, package)


@pytest.mark.parametrize(
    ("package", "module"),
    [("deepspeed", "sedd_scale.engine"), ("megatron-core", "sedd_scale.parallel")],
)
def test_a_command_ends_in_one_line(package: str, module: str, tmp_path: Path) -> None:
    """With other metadata before the real ones, as after `pip install -U`."""
    folder = tmp_path / f"{package.replace('-', '_')}-9.9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9.9\n")
    program = (
        "import importlib, sys; from sedd_scale.cli import make_parser, run_command\n"
        f"load = lambda arguments: importlib.import_module({module!r}) and 0\n"
        "sys.exit(run_command(make_parser('load', 'Load.', 'load'), load, []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"load: error: {package} ") and f"pip install {package}==" in line
