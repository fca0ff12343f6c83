"""YAML as the configuration reads and writes it: the scalars of YAML 1.2, no key given twice.

PyYAML follows YAML 1.1, in which `1e-3` is text and `off` is false. Both occur in a configuration.
"""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from sedd_scale.errors import ConfigError

_PLAIN_TEXT = re.compile(r"[A-Za-z_][\w./-]*\Z", re.ASCII)
_WORDS_OF_YAML_1_1 = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


class _Loader(yaml.SafeLoader):
    """A loader with the scalars of YAML 1.2's core schema that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )
# YAML 1.1 reads 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for; a ConfigError that names `source` if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        where = ""
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            where = f" line {error.problem_mark.line + 1}:"
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}:{where} not readable as YAML: {problem}") from error


def read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file; a ConfigError if it is missing, empty, undecodable or another."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file: check the path") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory: name a YAML file in it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from error
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise ConfigError(f"{path} is empty: a config has at least one section or a base")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not sections of keys and values")
    return tree


def scalar_text(value: Any) -> str:
    """One value as YAML text that readers of YAML 1.1 and 1.2 take for the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        mantissa, exponent, power = repr(value).partition("e")
        return mantissa + (".0" if exponent and "." not in mantissa else "") + exponent + power
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)  # which is YAML too
    if isinstance(value, str):
        if _PLAIN_TEXT.match(value) and value.lower() not in _WORDS_OF_YAML_1_1:
            return value
        quoted: str = yaml.safe_dump(value, default_style='"', width=float("inf"))
        return quoted.rstrip("\n")
    return str(value)
