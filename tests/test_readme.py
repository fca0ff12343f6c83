"""README and docs: their commands, keys, files and links exist, and their Python runs."""

import argparse
import ast
import importlib.util
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from sedd_scale import __main__ as package_commands
from sedd_scale.config import Config, load_config
from sedd_scale.config_reference import reference
from sedd_scale.errors import ConfigError
from tests.interop.tiny_checkpoints import write_checkpoint
from tools import (
    benchmark,
    compare,
    convert_ckpt,
    eval_ppl,
    generate,
    plan,
    plot_run,
    prepare_data,
    quickstart,
    samples,
    submit,
    train,
)

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    f"tools/{module.__name__.rpartition('.')[2]}.py": module.build_parser
    for module in (
        benchmark,
        compare,
        convert_ckpt,
        eval_ppl,
        generate,
        plan,
        plot_run,
        prepare_data,
        quickstart,
        samples,
        submit,
        train,
    )
}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
KEY = re.compile(r"[a-z]+\.[a-z_0-9]+")
# Files whose names look like keys.
FILES = ("model.safetensors", "checkpoint.pth")
FOLDERS = ("tools", "configs", "docs", "sedd_scale", "tests")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line of every `sh` block, continuations joined."""
    return [
        (page.name, line.strip())
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def known_keys() -> set[str]:
    return {
        f"{section.name}.{key.name}"
        for section in fields(Config)
        for key in fields(section.type)  # type: ignore[arg-type]
    }


def after_launcher(words: list[str]) -> tuple[int | None, list[str]]:
    """Number of processes, if a launcher states it, and the tool with its arguments."""
    launcher = Path(words[0]).name
    if launcher == "python":
        return None, words[1:]
    assert launcher == "torchrun", f"{launcher} is no launcher of this project"
    parser = argparse.ArgumentParser()
    parser.add_argument("--standalone", action="store_true")
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    launched = parser.parse_args(words[1:])
    return launched.nproc_per_node, launched.rest


def check_training(arguments: list[str], num_processes: int) -> None:
    """Refuse a line for tools/train.py whose configuration cannot run on so many processes."""
    parsed = train.build_parser().parse_intermixed_args(arguments)
    config = load_config(ROOT / parsed.config, parsed.overrides)
    config.require_data()
    config.validate(num_processes)


def check_command(line: str) -> None:
    """Fail unless the line is one that its program takes."""
    words = shlex.split(line.partition(" > ")[0])
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert len(words) >= 2 and words[1] in targets, line
        return
    if words[0] == "lm_eval":  # of another package, which knows the model by its name
        assert words[1:3] == ["--model", "sedd_scale"], line
        return
    num_processes, rest = after_launcher(words)
    while rest[:1] == ["-W"]:
        rest = rest[2:]
    if rest[:2] == ["-m", "sedd_scale"]:
        package_commands.build_parser().parse_args(rest[2:])
        return
    if rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None, line
        if rest[1] == "pytest":
            assert all((ROOT / word).exists() for word in rest[2:] if word[0] != "-"), line
        return
    assert (ROOT / rest[0]).is_file(), line
    if rest[0].startswith(("tests/", "examples/")):
        return
    if rest[0] == "tools/train.py":
        check_training(rest[1:], num_processes or 1)
    elif rest[0] == "tools/plan.py":
        parsed = plan.build_parser().parse_intermixed_args(rest[1:])
        load_config(ROOT / parsed.config, parsed.overrides).validate()
    elif rest[:2] == ["tools/prepare_data.py", "inspect"]:
        prepare_data.build_inspect_parser().parse_args(rest[2:])
    elif rest[:2] == ["tools/submit.py", "status"]:
        submit.build_status_parser().parse_args(rest[2:])
    elif rest[0] == "tools/submit.py":
        submit.build_parser().parse_intermixed_args(rest[1:])
    else:
        PARSERS[rest[0]]().parse_args(rest[1:])


def test_every_step_from_text_to_export_is_shown_in_the_readme():
    shown = {
        word
        for page, line in commands()
        if page == "README.md"
        for word in shlex.split(line)
        if word.startswith("tools/")
    }
    assert {*PARSERS} - {"tools/quickstart.py", "tools/samples.py"} <= shown
    assert {"make quickstart", "make test"} <= {line for _, line in commands()}


@pytest.mark.parametrize(("page", "line"), commands())
def test_command_exists(page: str, line: str):
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "make everything",
        "python tools/gone.py",
        "python tools/generate.py --checkpoint runs/a --output o.jsonl --heat 1",
        "python tools/train.py configs/runs/tiny.yaml --run-dir r data.path=d model.depth=3",
        "torchrun --nproc-per-node 3 tools/train.py configs/runs/tiny.yaml --run-dir r data.path=d",
        "python tools/train.py configs/runs/tiny.yaml --run-dir r",
        "python -m sedd_scale.gone",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str):
    with pytest.raises((AssertionError, SystemExit, ConfigError)):
        check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_files_in_the_text_exist(page: Path):
    sections = {section.name for section in fields(Config)}
    for code in INLINE.findall(prose(page)):
        key = code.partition("=")[0]
        is_key = KEY.fullmatch(key) and key.partition(".")[0] in sections
        if is_key and not is_module(key) and key not in FILES:
            assert key in known_keys(), f"{page.name}: `{code}`"
            if "=" in code:
                Config().override(code)
        path = code.split()[0]
        if path.partition("/")[0] in FOLDERS and "/" in path:
            assert (ROOT / path).exists(), f"{page.name}: `{code}`"
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            assert flag in known_flags(), f"{page.name}: `{code}`"


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package, such as data.loader."""
    return (ROOT / "sedd_scale" / f"{name.replace('.', '/')}.py").is_file()


def known_flags() -> set[str]:
    torchrun = {"--max-restarts", "--nnodes", "--signals-to-handle", "--shutdown-timeout"}
    flags = {"--run-dir", "--full", *torchrun}  # --full is of the tests
    parsers = [build_parser() for build_parser in PARSERS.values()]
    parsers.append(package_commands.build_parser())
    while parsers:
        for action in parsers.pop()._actions:
            flags.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path):
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {target}"


def said(path: Path) -> list[str]:
    """The strings of a program, with {} for what they are filled with."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) else "{}"

    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]


def test_messages_of_troubleshooting_are_said_somewhere():
    programs = [*(ROOT / "sedd_scale").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    everything = "\n".join(text for path in programs for text in said(path))
    everything += "".join(path.read_text() for path in (ROOT / "slurm").glob("*.sh"))
    rows = re.findall(
        r"^\| (`.*?) \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 20
    of_others = {"No space left on device"}
    for message in {code for row in rows for code in INLINE.findall(row)} - of_others:
        assert message.replace("-N.", "-{}.") in everything, message


def test_configuration_reference_is_up_to_date():
    """If not: python -m sedd_scale.config_reference > docs/configuration.md"""
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference()
    for key in known_keys():
        assert f"| `{key}` |" in reference()


def test_python_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With small untrained models in the places of the published one and of the reader's."""
    import torch

    from sedd_scale.interop.convert import write_published
    from sedd_scale.model.score_model import ScoreModel
    from sedd_scale.parallel.layout import initialize_layout

    config = load_config(ROOT / "configs/models/tiny.yaml")
    model = ScoreModel(config, 50, initialize_layout(), block_length=64)
    write_published(model, tmp_path / "sedd-small", None)
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs/books", block_length=64)
    sampling, snippet = blocks(ROOT / "README.md", "python")
    exec(compile(sampling, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("It was ") == 2
    names: dict[str, torch.Tensor] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["log_score_BLV"].shape == (2, 64, 51)
    assert names["nats_B"].shape == (2,)
    # An untrained head is zero: every masked token costs ln N, at the rate of its time.
    share = (names["masked_BL"] == 50).double().sum(1) / names["t_B"].double()
    expected = share * torch.log(torch.tensor(50.0, dtype=torch.float64))
    torch.testing.assert_close(names["nats_B"].double(), expected, rtol=1e-4, atol=0.0)
