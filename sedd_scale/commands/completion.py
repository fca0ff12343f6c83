"""Print the script with which a shell completes the commands, their options and their values."""

import argparse
import importlib

from sedd_scale.cli import Command, given_path, make_parser
from sedd_scale.commands import COMMANDS as NAMES
from sedd_scale.config.tree import config_keys

SHELLS = ("bash", "zsh", "tcsh")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale completion",
        "Print a script that lets a shell complete the commands of sedd-scale, their options and "
        "their values. zsh and tcsh: see docs/commands.md.",
        'eval "$(sedd-scale completion bash)"',
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that it is for")
    return parser


def whole_parser() -> argparse.ArgumentParser:
    """All commands in one parser, with a subparser for each; it is asked, never run."""
    whole = argparse.ArgumentParser(prog="sedd-scale")
    subparsers = whole.add_subparsers(metavar="COMMAND")
    for name, text in NAMES.items():
        commands = importlib.import_module(f"sedd_scale.commands.{name}").COMMANDS
        parser = _copy(subparsers, name, commands[""], text)
        if len(commands) > 1:
            inner = parser.add_subparsers(metavar="SUBCOMMAND")
            for word, command in commands.items():
                if word:
                    _copy(inner, word, command, word)
    return whole


def _copy(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    text: str,
) -> argparse.ArgumentParser:
    import shtab

    original = command.build_parser()
    for action in original._actions:
        if action.dest == "overrides":
            action.choices = [f"{key}=" for key, _ in config_keys()]
        elif action.type is given_path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return subparsers.add_parser(name, parents=[original], add_help=False, help=text)


def completion_command(arguments: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    print(shtab.complete(whole_parser(), shell=arguments.shell))


COMMANDS = {"": Command(build_parser, completion_command)}
