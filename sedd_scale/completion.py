"""Tab completion of the commands' options, values and configuration keys, as a script for bash.

The script is written out once, from the parsers themselves, and starts no Python while completing.
It completes `tools/NAME.py`, run as it is or by `python` or `torchrun`, and `python -m sedd_scale`.
"""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from sedd_scale.config import Config
from sedd_scale.errors import ConfigError

TOOLS = Path(__file__).resolve().parents[1] / "tools"
LAUNCHERS = ("python", "python3", "torchrun")
# In the place of an option: words that follow without one.
WORDS = "<>"


@dataclass
class Command:
    """What can be typed after a command or subcommand.

    Attributes:
        options: its long options.
        values: of options that take a value, what is allowed; empty: a file or anything.
        subcommands: words that may follow.
        takes_keys: whether section.key=value may follow.
    """

    options: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    subcommands: list[str] = field(default_factory=list)
    takes_keys: bool = False


def commands_of(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, Command]]:
    """The command and its subcommands, each under its words such as "benchmark loss"."""
    command = Command()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            command.subcommands += list(action.choices)
            for word, subparser in action.choices.items():
                for words, found in commands_of(f"{name} {word}", subparser):
                    yield words, found
                    if word == getattr(parser, "default_subcommand", None):
                        command.options += [o for o in found.options if o not in command.options]
                        command.values.update(found.values)
        elif action.dest == "overrides":
            command.takes_keys = True
        elif action.choices and not action.option_strings:
            command.values[WORDS] = [str(choice) for choice in action.choices]
        if action.help == argparse.SUPPRESS:
            continue
        for option in action.option_strings:
            if option.startswith("--"):
                command.options.append(option)
                if action.nargs != 0:
                    command.values[option] = [
                        str(choice) for choice in action.choices or () if " " not in str(choice)
                    ]
    yield name, command


def all_parsers(folder: Path = TOOLS) -> dict[str, argparse.ArgumentParser]:
    """The parser of every tool by its name, and of its subcommands that have their own.

    Raises:
        ConfigError: the tools are not beside the package.
    """
    paths = sorted(folder.glob("*.py"))
    if not paths:
        raise ConfigError(f"{folder} holds no tools: run this in a copy of the repository")
    parsers = {}
    for path in paths:
        spec = importlib.util.spec_from_file_location(f"_tool_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parsers[path.stem] = module.build_parser()
        for name in vars(module):
            if found := re.fullmatch(r"build_(\w+)_parser", name):
                parsers[f"{path.stem} {found[1]}"] = getattr(module, name)()
    return parsers


def all_commands(parsers: Mapping[str, argparse.ArgumentParser]) -> dict[str, Command]:
    """Every command and subcommand under its words."""
    commands: dict[str, Command] = {}
    for name, parser in parsers.items():
        commands.update(commands_of(name, parser))
    for name in parsers:
        first, _, word = name.partition(" ")
        if word:
            commands[first].subcommands.append(word)
    return commands


def key_values() -> dict[str, list[str]]:
    """Every configuration key, with the values it allows where they can be listed."""
    keys = {}
    for section in fields(Config):
        for key in fields(section.type):  # type: ignore[arg-type]
            choices = key.metadata.get("choices") or ()
            if key.type in ("bool", "bool | None", bool):
                choices = ("true", "false")
            keys[f"{section.name}.{key.name}"] = [str(choice) for choice in choices]
    return keys


def bash_script(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """The script; `parsers` as of `all_parsers`, and of the package's own under "sedd_scale"."""
    commands, keys = all_commands(parsers), key_values()
    tools = [name for name in commands if " " not in name]
    cases: dict[str, list[str]] = {"options": [], "subcommands": [], "values": []}
    for name, command in commands.items():
        cases["options"].append(_case(name, command.options))
        if command.subcommands:
            cases["subcommands"].append(_case(name, command.subcommands))
        for option, values in command.values.items():
            cases["values"].append(_case(f"{name} {option}", values))
    for key, values in keys.items():
        cases["values"].append(_case(key, values))
    with_keys = "|".join(shlex.quote(name) for name in commands if commands[name].takes_keys)
    files = [f"{name}.py" for name in tools if name != "sedd_scale"]
    return _BASH.format(
        tools="|".join(tools),
        with_keys=with_keys,
        keys=" ".join(keys),
        launchers=" ".join(LAUNCHERS),
        files=" ".join(files),
        **{name: "\n".join(lines) for name, lines in cases.items()},
    )


def _case(pattern: str, words: list[str]) -> str:
    return f"    {shlex.quote(pattern)}) words={shlex.quote(' '.join(words))} ;;"


_BASH = r"""# Completion of sedd_scale's commands; to load it:
#   source <(python -m sedd_scale completion bash)

# words: the long options of a command.
_sedd_scale_options() {{
  case $1 in
{options}
    *) words='' ;;
  esac
}}

# words: what may follow a command first.
_sedd_scale_subcommands() {{
  case $1 in
{subcommands}
    *) words='' ;;
  esac
}}

# words: the values of a command's option or of a key; fails if it takes none.
_sedd_scale_values() {{
  case $1 in
{values}
    *) return 1 ;;
  esac
}}

_sedd_scale() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
  local command='' words='' word name place
  # Bash makes three words of key=value.
  if [[ $current == = ]]; then
    current=''
  elif [[ $previous == = ]]; then
    previous=${{COMP_WORDS[COMP_CWORD - 2]}}
  fi
  COMPREPLY=()
  for ((place = 0; place < COMP_CWORD; place++)); do
    word=${{COMP_WORDS[place]}}
    if [[ -n $command ]]; then
      _sedd_scale_subcommands "$command"
      if [[ " $words " == *" $word "* ]]; then
        command+=" $word"
      fi
      continue
    fi
    name=${{word##*/}}
    case ${{name%.py}} in
      {tools})
        if [[ $name == *.py && ($place == 0 || $word == */*) ]]; then
          command=${{name%.py}}
        elif [[ $word == sedd_scale && ${{COMP_WORDS[place - 1]}} == -m ]]; then
          command=$word
        fi
        ;;
    esac
  done
  if [[ -z $command ]]; then
    # Another program of this launcher.
    name=${{1##*/}}
    if [[ -n ${{_sedd_scale_before[$name]:-}} ]]; then
      "${{_sedd_scale_before[$name]}}" "$@"
    fi
    return
  fi
  if _sedd_scale_values "$command $previous" || _sedd_scale_values "$previous"; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  elif [[ $current == -* ]]; then
    _sedd_scale_options "$command"
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  else
    _sedd_scale_values "$command <>" || _sedd_scale_subcommands "$command"
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    case $command in
      {with_keys})
        if [[ -n $current && ${{#COMPREPLY[@]}} == 0 ]]; then
          COMPREPLY=($(compgen -S = -W '{keys}' -- "$current"))
          [[ ${{#COMPREPLY[@]}} == 0 ]] || compopt -o nospace 2>/dev/null
        fi
        ;;
    esac
  fi
}}

declare -gA _sedd_scale_before
_sedd_scale_register() {{
  local name before
  for name in {launchers}; do
    if declare -F _comp_load >/dev/null; then
      _comp_load -- "$name" 2>/dev/null
    elif declare -F _completion_loader >/dev/null; then
      _completion_loader "$name" 2>/dev/null
    fi
    before=$(complete -p "$name" 2>/dev/null)
    if [[ $before =~ \ -F\ ([^ ]+) && ${{BASH_REMATCH[1]}} != _sedd_scale ]]; then
      _sedd_scale_before[$name]=${{BASH_REMATCH[1]}}
    fi
  done
  complete -o bashdefault -o default -F _sedd_scale {launchers} {files}
}}
_sedd_scale_register
unset -f _sedd_scale_register
"""
