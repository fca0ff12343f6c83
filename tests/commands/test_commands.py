"""Every command: --help with an example and exit codes, --version, quick, one meaning a flag."""

import argparse
import importlib
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from sedd_scale import __version__
from sedd_scale.__main__ import main
from sedd_scale.cli import Command, make_parser, run_command
from sedd_scale.commands import COMMANDS
from sedd_scale.errors import ConfigError
from tests.repository import ROOT

HEAVY = ("torch", "deepspeed", "megatron", "matplotlib", "wandb", "transformers", "rich")
# Shown in place of a value; a flag has one of these in every command, or several that say the same.
SAME = [{"FILE", "FILE.jsonl", "FILE.png", "FILE.html", "FILE.json", "DIR", "PATH"}]


def run(words: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def subcommands(name: str) -> dict[str, Command]:
    found: dict[str, Command] = importlib.import_module(f"sedd_scale.commands.{name}").COMMANDS
    return found


def every_parser() -> dict[str, argparse.ArgumentParser]:
    """Of every command and subcommand, by its words."""
    found: dict[str, argparse.ArgumentParser] = {}
    left = [
        (f"{name} {word}".strip(), command.build_parser())
        for name in COMMANDS
        for word, command in subcommands(name).items()
    ]
    while left:
        name, parser = left.pop()
        found[name] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                left += [(f"{name} {word}", sub) for word, sub in action.choices.items()]
    return found


PARSERS = every_parser()


def test_the_folders_and_the_list_name_the_same_commands() -> None:
    modules = {path.stem for path in (ROOT / "sedd_scale/commands").glob("[!_]*.py")}
    assert modules == set(COMMANDS)
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools == modules


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tools").glob("*.py")))
def test_a_tool_is_its_command(name: str) -> None:
    """python tools/NAME.py prints what sedd-scale NAME prints, help and errors alike."""
    for words in (["--help"], ["--no-such-option"]):
        tool = run([f"tools/{name}.py", *words])
        command = run(["-m", "sedd_scale", name, *words])
        assert (tool.returncode, tool.stdout, tool.stderr) == (
            command.returncode,
            command.stdout,
            command.stderr,
        )


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalppl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no command evalppl; did you mean eval_ppl" in error
    assert main(["zzz"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no command zzz; `sedd-scale --help` lists them" in error


def test_descriptions_fit_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        _, description, *_ = capsys.readouterr().out.split("\n\n")
        assert max(map(len, description.splitlines())) <= 60, description


def test_the_list_of_commands_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and text in shown for name, text in COMMANDS.items())
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_imports_nothing_heavy(command: str):
    # Of this process's children: seconds of the clock would be other programs' too.
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(["-m", "sedd_scale", command, "--help"], "-X", "importtime")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime - begun.ru_utime + ended.ru_stime - begun.ru_stime
    assert done.returncode == 0 and done.stdout.startswith("usage: ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not [name for name in imported if name.partition(".")[0] in HEAVY]
    assert seconds < 2.0


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    command = f"{sys.executable} -m sedd_scale plan configs/models/small.yaml --vocab-size 50257"
    line = f"{command} --block-length 1024 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]):
    def command(_: argparse.Namespace) -> None:
        raise BrokenPipeError("pipe:fetch broke: try again")

    assert run_command(make_parser("fetch", "Fetch.", "fetch"), command, []) == 2
    assert capsys.readouterr().err == "fetch: error: pipe:fetch broke: try again\n"


def test_an_error_of_the_system_names_the_file_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone = tmp_path / "gone"

    def command(_: argparse.Namespace) -> None:
        gone.read_text()

    assert run_command(make_parser("fetch", "Fetch.", "fetch"), command, []) == 2
    assert capsys.readouterr().err == f"fetch: error: {gone}: No such file or directory\n"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_an_error_of_a_subcommand_is_one_line_unless_asked(
    debug: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)  # other tests' too
    wrong = ["loss", "--mean"]  # of the other graph
    for words in ([*debug, *wrong], [*wrong, *debug]):
        if debug:
            with pytest.raises(ConfigError, match="--graph uniform"):
                main(["benchmark", *words])
            continue
        assert main(["benchmark", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sedd-scale benchmark: error: --mean") and error.count("\n") == 1


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]):
    def command(_: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    assert run_command(make_parser("fetch", "Fetch.", "fetch"), command, []) == 130
    assert capsys.readouterr().err == "fetch: interrupted\n"


def test_without_standard_output_a_command_works():
    line = f"{sys.executable} -m sedd_scale completion bash >&-"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_empty_path_is_refused():
    done = run(["-m", "sedd_scale", "train", "configs/runs/tiny.yaml", "--run-dir", ""])
    assert done.returncode == 2
    assert "argument --run-dir: is empty: give a path" in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", "--steps", "0"], "argument --steps: 0 is too small: give at least 1"),
        (["generate", "--seed", "-1"], "argument --seed: -1 is too small: give at least 0"),
        (["eval_ppl", "--batch-size", "few"], "argument --batch-size: 'few' is not an integer"),
        (["plan", "--mfu", "0"], "argument --mfu: 0: give a number above 0"),
        (["plan", "--mfu", "nan"], "argument --mfu: nan: give a number above 0"),
        (["samples", "--steps-per-second", "x"], "'x' is not a number"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_flag(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_version_and_an_unknown_option(command: str):
    done = run(["-m", "sedd_scale", command, "--version"])
    assert (done.returncode, done.stdout) == (0, f"sedd_scale {__version__}\n")
    done = run(["-m", "sedd_scale", command, "--no-such-option"])
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", PARSERS)
def test_help_shows_an_example_and_exit_codes(name: str):
    text = PARSERS[name].format_help()
    _, _, rest = text.partition("\nexample:\n  ")
    example, _, codes = rest.partition("\n\nexit codes:\n")
    assert example and {"  0 ", "  1 ", "  2 "} <= {line[:4] for line in codes.splitlines()}
    flags = {flag for action in PARSERS[name]._actions for flag in action.option_strings}
    assert {"--help", "--version", "--debug"} <= flags
    called = name.removesuffix(" convert")  # a command that is also called by its name alone
    assert f"sedd-scale {called}" in example or f"-m sedd_scale {called}" in example
    assert PARSERS[name].prog == f"sedd-scale {called}"
    for action in PARSERS[name]._actions:
        if action.help is not argparse.SUPPRESS and action.option_strings:
            assert action.help or action.choices, action.option_strings


def kind_of(converter: Any) -> str:
    """The type of an argument's values, whatever its limits."""
    name = "str" if converter is None else converter.__qualname__.partition(".")[0]
    kinds: dict[str, str] = {"given_path": "str", "at_least": "int", "positive": "float"}
    return kinds.get(name, name)


def test_a_flag_means_the_same_everywhere():
    """One type and one number of values; what it stands for is written alike."""
    uses = defaultdict(list)
    for name, parser in PARSERS.items():
        for action in parser._actions:
            for flag in action.option_strings:
                uses[flag].append((name, action))
    for flag, actions in uses.items():
        kinds = {(type(action), action.nargs) for _, action in actions}
        assert len(kinds) == 1, (flag, actions)
        types = {kind_of(a.type) for _, a in actions}
        assert len(types) == 1, (flag, types)
        placeholders = {a.metavar for _, a in actions if a.metavar and not a.choices}
        alike = len(placeholders) <= 1 or any(placeholders <= group for group in SAME)
        assert alike, (flag, placeholders)
        allowed = [set(a.choices) for _, a in actions if a.choices]
        for one in allowed:
            # A command may allow fewer values of a kind, or more.
            assert any(one <= other or other <= one for other in allowed), flag
        has_choices = {bool(a.choices) for _, a in actions}
        assert len(has_choices) == 1, (flag, "a choice here and a free value there")


def test_what_has_one_name_has_no_other():
    """Names that were in use for the same thing, or are near enough to be tried."""
    flags = {
        flag for parser in PARSERS.values() for a in parser._actions for flag in a.option_strings
    }
    others = "--out --outdir --output-dir --output-path --ckpt --model-path --run --rundir --batch"
    others += " --bs --random-seed --dtype --vocab --cpus --workers --num-workers --num-processes"
    assert not flags & set(others.split())
