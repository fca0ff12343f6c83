"""The shells complete what the parsers take."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sedd_scale.commands import COMMANDS
from sedd_scale.commands.completion import SHELLS
from tests.repository import ROOT


def script(shell: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sedd_scale", "completion", shell],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "sedd-scale.bash"
    path.write_text(script("bash"))
    return path


def completed(path: Path, *words: str) -> set[str]:
    """What bash offers for the last word of a command line."""
    line = " ".join(words)
    program = f"""
    source {path}
    COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
    COMP_CWORD={len(words) - 1} COMP_LINE='{line}' COMP_POINT={len(line)}
    compopt() {{ :; }}
    _sedd_scale
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {word.strip() for word in done.stdout.splitlines() if word.strip()}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tra"], {"train"}),
        (["plot"], {"plot_run"}),
        (["train", "--rep"], {"--replay"}),
        (["eval_ppl", "--weights", "m"], {"master"}),
        (["generate", "--prom"], {"--prompts"}),
        (["generate", "--precision", "b"], {"bf16"}),
        (["benchmark", "comm"], {"communication"}),
        (["benchmark", "sample", "--sampler", "anc"], {"ancestral"}),
        (["convert_ckpt", "verify", "--tol"], {"--tolerance"}),
        (["submit", "status", "--j"], {"--json"}),
        (["experiment", "cov"], {"coverage"}),
        (["submit", "sta"], {"status"}),
        (["convert_ckpt", "ver"], {"verify"}),
        (["convert-ckpt", "verify", "--tol"], {"--tolerance"}),
        (["prepare_data", "--input", "READ"], {"README.md"}),
        (["train", "a.yaml", "training.prec"], {"training.precision="}),
        (["train", "a.yaml", "training.precision", "=", "b"], {"bf16"}),
        (["train", "a.yaml", "graph.name", "="], {"absorb", "uniform"}),
        (["train", "a.yaml", "model.document_attention", "=", "t"], {"true"}),
        (["train", "a.yaml", "model.scale_by_sigma", "=", "n"], {"null"}),
        (["train", "a.yaml", "data.path", "=", "READ"], {"README.md"}),
        (["generate", "--output", "=", "READ"], {"README.md"}),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),
)
def test_bash_completes(words: list[str], offered: set[str], bash: Path) -> None:
    assert completed(bash, "sedd-scale", *words) == offered


def test_bash_offers_every_command(bash: Path) -> None:
    assert completed(bash, "sedd-scale", "") >= set(COMMANDS)


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shell != "bash"])
def test_other_shells_get_every_command(shell: str) -> None:
    text = script(shell)
    assert all(name in text for name in COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)
