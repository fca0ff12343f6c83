"""README and docs: their commands, keys, files and links exist, and their Python runs."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from sedd_scale.cli import Command
from sedd_scale.commands import COMMANDS
from sedd_scale.config import Config, load_config
from sedd_scale.config.reference import reference
from sedd_scale.errors import ConfigError
from tests.interop.tiny_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "slurm/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
KEY = re.compile(r"[a-z]+\.[a-z_0-9]+")
# A table whose first column alone holds names of this program.
THEIRS = re.compile(r"<!-- names of other programs.*?-->(.*?)<!-- end of names -->", re.DOTALL)
# Files whose names look like keys.
FILES = ("model.safetensors", "checkpoint.pth")
FOLDERS = ("tools", "configs", "docs", "sedd_scale", "tests", "slurm", "benchmarks", "examples")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def prose(page: Path) -> str:
    """The page without its fenced blocks and without other programs' names."""

    def first_column(table: re.Match[str]) -> str:
        return "\n".join(row.split("|")[1] for row in table[1].strip().splitlines())

    return THEIRS.sub(first_column, BLOCK.sub("", page.read_text(encoding="utf-8")))


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line of every `sh` block, continuations joined."""
    return [
        (page.relative_to(ROOT).as_posix(), line.strip())
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


def subcommands_of(name: str) -> dict[str, Command]:
    """What a name of sedd-scale runs, by the word that follows it; "" is the name alone."""
    assert name in COMMANDS, f"no command {name}"
    found: dict[str, Command] = importlib.import_module(f"sedd_scale.commands.{name}").COMMANDS
    return found


def after_torchrun(words: list[str]) -> tuple[int, list[str]]:
    """Number of processes, and what they run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--standalone", action="store_true")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--max-restarts", type=int)
    parser.add_argument("--rdzv-backend")
    parser.add_argument("--rdzv-endpoint")
    parser.add_argument("-m", dest="module", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    launched = parser.parse_args(words)
    rest = ["-m", *launched.rest] if launched.module else launched.rest
    return launched.nnodes * launched.nproc_per_node, rest


def after_srun(words: list[str]) -> tuple[int, list[str]]:
    """Number of tasks, and what they run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ntasks-per-node", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    launched = parser.parse_args(words)
    return launched.nodes * launched.ntasks_per_node, launched.rest


def check_own(name: str, arguments: list[str], num_processes: int) -> None:
    """Fail unless a command of sedd-scale takes these arguments, and its configuration can run."""
    subcommands = subcommands_of(name)
    named = bool(arguments) and arguments[0] in subcommands
    build_parser, _, intermixed = subcommands[arguments[0] if named else ""]
    parser = build_parser()
    parse = parser.parse_intermixed_args if intermixed else parser.parse_args
    parsed = parse(arguments[named:])
    if name in ("train", "plan", "submit") and hasattr(parsed, "config"):
        config = load_config(ROOT / parsed.config, parsed.overrides)
        if name == "train":
            assert config.data.path or config.data.mixture, "train needs data"
            config.validate(num_processes)
        else:
            config.validate()


def check_python(words: list[str], num_processes: int) -> None:
    """Fail unless python can run what follows it on the line."""
    while words[:1] == ["-W"]:
        words = words[2:]
    if words[0] != "-m":
        script = Path(words[0])
        assert (ROOT / script).is_file(), f"no file {script}"
        if script.parts[0] == "tools":
            check_own(script.stem, words[1:], num_processes)
    elif words[1] == "sedd_scale":
        check_own(words[2], words[3:], num_processes)
    else:
        assert importlib.util.find_spec(words[1]) is not None, f"no module {words[1]}"
        if words[1] == "pytest":
            assert all((ROOT / word).exists() for word in words[2:] if word[0] != "-")


def check_command(line: str) -> None:
    """Fail unless the line is one that its program takes."""
    line = re.sub(r"^[a-z]+=\$\((.*)\)$", r"\1", line)  # its output goes to a variable
    words = shlex.split(line.partition(" > ")[0])
    while re.match(r"[A-Z_]+=", words[0]) or words[0] == "sudo":
        words = words[1:]
    num_processes = 1
    if words[0] == "srun":
        num_processes, words = after_srun(words[1:])
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest and rest[0] in targets, line
    elif program == ".":
        assert rest == [".venv/bin/activate"], line
    elif program == "hf":  # of the Hugging Face hub
        assert rest[0] == "download", line
    elif program == "sbatch":
        (script,) = [word for word in rest if word.endswith(".sh")]
        assert (ROOT / script).is_file(), line
    elif program == "sedd-scale":
        check_own(rest[0], rest[1:], num_processes)
    elif program == "python":
        check_python(rest, num_processes)
    else:
        assert program == "torchrun", f"{program} is no launcher of this project"
        num_processes, rest = after_torchrun(rest)
        check_python(rest, num_processes)


@pytest.mark.parametrize(("page", "line"), commands())
def test_command_exists(page: str, line: str):
    check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "make everything",
        "python tools/gone.py",
        "sedd-scale gone",
        "sedd-scale generate --checkpoint runs/a --output o.jsonl --heat 1",
        "python tools/generate.py --checkpoint runs/a --output o.jsonl --heat 1",
        "sedd-scale train configs/runs/tiny.yaml --run-dir r data.path=d model.depth=3",
        "torchrun --nproc-per-node 3 -m sedd_scale train configs/runs/tiny.yaml --run-dir r "
        "data.path=d",
        "torchrun --nproc-per-node 3 tools/train.py configs/runs/tiny.yaml --run-dir r data.path=d",
        "sedd-scale train configs/runs/tiny.yaml --run-dir r",
        "python -m sedd_scale.gone",
        "sbatch slurm/gone.sh",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str):
    with pytest.raises((AssertionError, SystemExit, ConfigError)):
        check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_commands_and_files_in_the_text_exist(page: Path):
    sections = {section.name for section in fields(Config)}
    name = page.relative_to(ROOT)
    for code in INLINE.findall(prose(page)):
        key = code.partition("=")[0]
        is_key = KEY.fullmatch(key) and key.partition(".")[0] in sections
        if is_key and not is_module(key) and key not in FILES:
            assert key in known_keys(), f"{name}: `{code}`"
            if "=" in code:
                Config().override(code)
        words = code.split()
        if words[0].partition("/")[0] in FOLDERS and "/" in words[0]:
            assert (ROOT / words[0]).exists(), f"{name}: `{code}`"
        if words[0] == "sedd-scale" and words[1:]:
            assert words[1] in {*COMMANDS, "NAME", "..."}, f"{name}: `{code}`"
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            assert flag in known_flags(), f"{name}: `{code}`"


def test_the_page_of_commands_lists_all_of_them():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `sedd-scale (\w+)` \|", page, re.MULTILINE)) == {*COMMANDS}


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of the package, such as data.loader."""
    return (ROOT / "sedd_scale" / f"{name.replace('.', '/')}.py").is_file()


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Those of all commands and of their subcommands."""
    found = [
        command.build_parser() for name in COMMANDS for command in subcommands_of(name).values()
    ]
    while found:
        yield (parser := found.pop())
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += action.choices.values()


def known_flags() -> set[str]:
    of_others = {"--full"}  # the tests
    of_others |= {"--max-restarts", "--nnodes", "--nproc-per-node"}  # torchrun
    of_others |= {"--signals-to-handle", "--shutdown-timeout"}
    of_others |= {"--exclude", "--signal", "--nodes", "--array", "--kill-on-invalid-dep"}  # Slurm
    return of_others | {flag for parser in parsers() for flag in parser._option_string_actions}


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


def test_every_page_is_in_the_index():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(LINK.findall(prose(ROOT / "docs/index.md")))


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
    """If not: python -m sedd_scale.config.reference > docs/configuration.md"""
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference()
    for key in known_keys():
        assert f"| `{key}` |" in reference()


def test_python_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With an untrained model in the place of the quickstart's."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "quickstart/run", block_length=64)
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    (snippet,) = blocks(ROOT / "README.md", "python")
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("def ") == 2
    # An untrained model has log2 257 = 8.0 bits a token, and what scores that are off cost.
    assert float(printed.split()[-1]) > 7.5


def test_python_of_a_published_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a small untrained model in the published one's place."""
    import torch

    from sedd_scale import save_pretrained
    from sedd_scale.interop.convert import convert
    from sedd_scale.model.score_model import ScoreModel
    from sedd_scale.parallel.layout import initialize_layout

    config = load_config(ROOT / "configs/models/tiny.yaml")
    model = ScoreModel(config, 50, initialize_layout(), block_length=64)
    save_pretrained(model, tmp_path / "sedd-small")
    monkeypatch.chdir(tmp_path)
    for_transformers, snippet = blocks(ROOT / "docs/checkpoints.md", "python")
    names: dict[str, torch.Tensor] = {}
    exec(compile(snippet, "docs/checkpoints.md", "exec"), names)
    assert names["log_score_BLV"].shape == (2, 64, 51)
    assert names["nats_B"].shape == (2,)
    # An untrained head is zero: every masked token costs ln N, at the rate of its time.
    share = (names["masked_BL"] == 50).double().sum(1) / names["t_B"].double()
    expected = share * torch.log(torch.tensor(50.0, dtype=torch.float64))
    torch.testing.assert_close(names["nats_B"].double(), expected, rtol=1e-4, atol=0.0)

    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    convert("sedd-hf", "hf", tmp_path / "sedd-small", tmp_path / "exported")
    exec(compile(for_transformers, "docs/checkpoints.md", "exec"), names)
    assert names["tokens"].shape == (4, 64) and int(names["tokens"].max()) < 50


def test_python_of_the_page_on_sampling_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs/books", block_length=64)
    (snippet,) = blocks(ROOT / "docs/sampling.md", "python")
    exec(compile(snippet.replace("383", "83"), "docs/sampling.md", "exec"), {})
