"""Print the script with which a shell completes the commands, their options and their values."""

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from sedd_scale.cli import Command, given_path, make_parser
from sedd_scale.commands import COMMANDS as NAMES
from sedd_scale.config.tree import config_keys

SHELLS = ("bash", "zsh", "tcsh")
# Of arguments that are files, or also names, URLs or patterns of files.
_FILES = ("GLOB", "PATH", "PATH_OR_NAME")
# What keys of these types take.
_TRUTHS: dict[Any, tuple[str, ...]] = {
    bool: ("true", "false"),
    bool | None: ("true", "false", "null"),
}

# Bash takes `key=value` apart at the `=`, and shtab's function knows neither values of keys, nor
# hyphens in a command's name, nor subcommands beside positional arguments.
_BASH = """
_sedd_scale() {{
  local before=${{COMP_WORDS[COMP_CWORD-1]}} word=${{COMP_WORDS[COMP_CWORD]}} key= line subcommands
  if [[ $word == "=" ]]; then
    key=$before word=
  elif [[ $before == "=" ]]; then
    key=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  COMPREPLY=()
  case $key in
{cases}
    ?*)
      compopt -o filenames 2>/dev/null
      while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$word")
      return ;;
  esac
  if ((COMP_CWORD > 1)); then COMP_WORDS[1]=${{COMP_WORDS[1]//-/_}}; fi
  _shtab_sedd_scale
  if ((COMP_CWORD == 2)); then
    subcommands="_shtab_sedd_scale_${{COMP_WORDS[1]}}_subparsers[*]"
    for line in $(compgen -W "${{!subcommands-}}" -- "$word"); do
      [[ " ${{COMPREPLY[*]}} " == *" $line "* ]] || COMPREPLY+=("$line")
    done
  fi
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
  return 0
}}

complete -o bashdefault -F _sedd_scale sedd-scale"""


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
        elif action.type is given_path or action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return subparsers.add_parser(name, parents=[original], add_help=False, help=text)


def completion_command(arguments: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    print(shtab.complete(whole_parser(), shell=arguments.shell))
    if arguments.shell == "bash":
        print(_BASH.format(cases="\n".join(_value_cases())))


def _value_cases() -> Iterator[str]:
    """For every key of few values, the branch of a shell's `case` that offers them."""
    for name, key in config_keys():
        values = key.metadata["choices"] or _TRUTHS.get(key.type, ())
        if values:
            words = " ".join(map(str, values))
            yield f"""\
    {name})
      COMPREPLY=($(compgen -W "{words}" -- "$word"))
      return ;;"""


COMMANDS = {"": Command(build_parser, completion_command)}
