"""Tab completion: what bash itself fills in, at a prompt and through its own `complete`."""

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sedd_scale.__main__ import build_parser
from sedd_scale.completion import all_parsers, bash_script
from sedd_scale.errors import ConfigError
from tests.repository import ROOT

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

# Calls the function that `complete` has registered for the line's first word, as readline does.
DRIVER = r"""
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
[[ $(complete -p "${1##*/}") =~ -F\ ([^ ]+) ]] && "${BASH_REMATCH[1]}" "$1" "${!#}" "${@: -2:1}"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "completion.bash"
    path.write_text(bash_script({**all_parsers(), "sedd_scale": build_parser()}))
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What the last of the words, as bash splits them, can become."""
    done = subprocess.run(
        ["bash", "--norc", "-c", f"source {script}\n{DRIVER}", "bash", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


def test_every_long_option_of_every_tool_is_completed(script: Path):
    for name, parser in all_parsers().items():
        tool, *subcommand = name.split()
        options = {
            flag for a in parser._actions for flag in a.option_strings if flag.startswith("--")
        }
        found = completed(script, "python", f"tools/{tool}.py", *subcommand, "--")
        assert options <= {*found}, name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["python", "tools/train.py", "c.yaml", "--rep"], ["--replay"]),
        (["tools/train.py", "c.yaml", "--rep"], ["--replay"]),
        ([".venv/bin/python", "tools/eval_ppl.py", "--weights", "m"], ["master"]),
        (["torchrun", "--nproc-per-node", "2", "tools/generate.py", "--prom"], ["--prompts"]),
        (["python", "tools/generate.py", "--precision", "=", "b"], ["bf16"]),
        (["python", "tools/generate.py", "--precision", "="], ["fp32", "bf16"]),
        (["python", "tools/train.py", "c.yaml", "training.prec"], ["training.precision="]),
        (["python", "tools/train.py", "training.precision", "=", "f"], ["fp32"]),
        (["python", "tools/plan.py", "model.time", "=", ""], []),
        (["python", "tools/benchmark.py", "comm"], ["communication"]),
        (["python", "tools/benchmark.py", "sample", "--sampler", "anc"], ["ancestral"]),
        (["python", "tools/convert_ckpt.py", "--fr"], ["--from"]),
        (["python", "tools/convert_ckpt.py", "verify", "--tol"], ["--tolerance"]),
        (["python", "tools/submit.py", "status", "--j"], ["--json"]),
        (["python", "-m", "sedd_scale", "do"], ["doctor"]),
        (["python", "-m", "sedd_scale", "doctor", "--q"], ["--quick"]),
        (["python", "-m", "sedd_scale", "completion", "b"], ["bash"]),
        (["python", "-m", "sedd_scale", "completion", "bash", "--d"], ["--debug"]),
        (["python", "tools/train.py", "configs/ru"], []),  # readline's own: files
        (["python", "tools/train.py", "--run-dir", "ru"], []),
        (["python", "other/train.txt", "--rep"], []),
    ],
)  # fmt: skip
def test_what_a_word_can_become(script: Path, words: list[str], expected: list[str]):
    assert completed(script, *words) == expected


def test_what_a_launcher_completed_before_it_still_does(script: Path, tmp_path: Path):
    before = "other() { COMPREPLY=(mine); }\ncomplete -F other python\n"
    both = tmp_path / "both.bash"
    both.write_text(before + f"source {script}\nsource {script}\n")
    assert completed(both, "python", "manage.py", "m") == ["mine"]
    assert completed(both, "python", "tools/train.py", "--rep") == ["--replay"]


def test_a_tab_at_a_prompt(script: Path):
    """An interactive bash on a terminal: keys in, screen out."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ.update(PS1="", TERM="dumb", HISTFILE="/dev/null", INPUTRC="/dev/null")
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    screen = b""
    try:
        os.write(terminal, f"source {script}; echo rea''dy\n".encode())
        screen = read_until(terminal, rb"\nready")
        os.write(terminal, b"echo python tools/train.py\x01\x0b")  # nothing stays in the line
        for typed, drawn in (
            (b"python tools/train.py --repl\t", rb"--replay "),
            (b"configs/runs/tin\t", rb"configs/runs/tiny\.yaml "),
            (b"training.prec\t", rb"training\.precision="),
            (b"b\t", rb"training\.precision=bf16 "),
        ):
            os.write(terminal, typed)
            screen = read_until(terminal, drawn)
    finally:
        os.close(terminal)
        os.kill(process, 9)
        os.waitpid(process, 0)
    assert screen


def read_until(terminal: int, pattern: bytes, seconds: float = 10.0) -> bytes:
    """What a terminal shows up to a match of the pattern."""
    deadline, seen = time.monotonic() + seconds, b""
    while not re.search(pattern, seen):
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):
                seen += os.read(terminal, 4096)
    return seen


def test_the_command_prints_the_script(script: Path):
    done = subprocess.run(
        [sys.executable, "-m", "sedd_scale", "completion", "bash"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == script.read_text()


def test_without_tools_the_error_says_where_they_are(tmp_path: Path):
    with pytest.raises(ConfigError, match="copy of the repository"):
        all_parsers(tmp_path)
