"""A configuration: the tree of sections, read from YAML files and dotted overrides, and checked."""

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from sedd_scale.config.rules import check_combinations, check_value
from sedd_scale.config.shipped import find_base, find_config
from sedd_scale.config.tree import ConfigTree, config_keys, sections
from sedd_scale.config.yaml_text import parse_yaml, read_yaml, scalar_text
from sedd_scale.errors import ConfigError


@dataclass(frozen=True)
class Config(ConfigTree):
    """Everything a run depends on; immutable, so that all readers agree."""

    def override(self, *assignments: str) -> "Config":
        """A copy with `section.key=value` assignments applied; ConfigError as in `load_config`."""
        values = dict(_flatten(self.to_dict(), "config"))
        values.update(_parse_override(assignment) for assignment in assignments)
        return _build(values)

    def validate(self, world_size: int | None = None) -> None:
        """Refuse what cannot run, by name, before any process group starts.

        A run that takes `data.block_length` or `model.vocab_size` from its dataset fills them in
        with `override` and validates again.

        Args:
            world_size: number of processes; None leaves out what depends on it.

        Raises:
            ConfigError: names the keys, their values and the fix.
        """
        for dotted, key in config_keys():
            section, _, name = dotted.partition(".")
            check_value(dotted, key.metadata, getattr(getattr(self, section), name))
        check_combinations(self)
        if world_size is not None:
            self.accumulation(world_size)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files its `base:` names, and dotted overrides.

    Bases (a path or a list, relative to the file) come first, later over earlier; the file comes
    over its bases, and overrides such as `parallel.tensor=2` over everything. A path or base that
    is not there may name a shipped file, as configs/runs/tiny.yaml does.

    Raises:
        ConfigError: a file is missing, empty or no YAML; bases form a circle; a key is unknown; a
            value has the wrong type. Limits and combinations are `Config.validate`'s work.
    """
    return _build(_load_file(find_config(path), ())).override(*overrides)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The inverse of `Config.to_dict`; keys left out take their defaults; raises ConfigError."""
    return _build(dict(_flatten(tree, "config")))


def _build(values: Mapping[str, Any]) -> Config:
    """The tree from dotted keys and values whose names and types are checked already."""
    filled = {
        section.name: section_type(
            **{
                key.name: values[f"{section.name}.{key.name}"]
                for key in fields(section_type)
                if f"{section.name}.{key.name}" in values
            }
        )
        for section, section_type in sections()
    }
    return Config(**filled)


def _load_file(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(str(link) for link in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: base: goes round in a circle ({circle}): remove one of them")
    tree = read_yaml(path)
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base={bases!r} is neither a path nor a list of paths")
    values: dict[str, Any] = {}
    for base in bases:
        values.update(_load_file(find_base(path, base), (*chain, resolved)))
    values.update(_flatten(tree, str(path)))
    return values


def _flatten(tree: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and typed values of nested mappings; raises ConfigError naming `source`."""
    keys = dict(config_keys())
    names = [section.name for section, _ in sections()]
    for name, section in tree.items():
        if name not in names:
            guess = _nearest_key(str(name), names)
            raise ConfigError(f"{source}: unknown section {name}; did you mean {guess}?")
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ConfigError(f"{source}: {name}={section!r} is not a section of keys and values")
        for key, value in section.items():
            dotted = f"{name}.{key}"
            if dotted not in keys:
                guess = _nearest_key(dotted, keys)
                raise ConfigError(f"{source}: unknown key {dotted}; did you mean {guess}?")
            yield dotted, _typed(dotted, keys[dotted], value, source)


def _parse_override(assignment: str) -> tuple[str, Any]:
    dotted, equals, text = assignment.partition("=")
    keys = dict(config_keys())
    if not equals:
        raise ConfigError(f"override {assignment!r} is not of the form section.key=value")
    if dotted not in keys:
        guess = _nearest_key(dotted, keys)
        raise ConfigError(f"override {assignment!r}: unknown key {dotted}; did you mean {guess}?")
    expected, may_be_null = _expected_type(keys[dotted])
    source = f"override {assignment!r}"
    # A path or a name is taken letter by letter: it may look like a number or hold a colon.
    if expected is str and not (may_be_null and text == "null"):
        return dotted, text
    return dotted, _typed(dotted, keys[dotted], parse_yaml(text, source), source)


def _nearest_key(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The known name closest to `name`: one with the same last part first, then by spelling."""
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key, _ in config_keys() if key.rpartition(".")[2] == leaf]
    return get_close_matches(name, same_leaf or list(known), n=1, cutoff=0.0)[0]


def _expected_type(key: Field[Any]) -> tuple[type[Any], bool]:
    """The type of a key's values and whether null is one of them."""
    if isinstance(key.type, types.UnionType):
        (expected,) = (part for part in typing.get_args(key.type) if part is not types.NoneType)
        return typing.get_origin(expected) or expected, True
    return cast(type[Any], key.type), False


_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
}


def _typed(dotted: str, key: Field[Any], value: Any, source: str) -> Any:
    expected, may_be_null = _expected_type(key)
    if value is None and may_be_null:
        return None
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or (expected is float and not math.isfinite(value)):
        wanted = _TYPE_NAMES[expected] + (" or null" if may_be_null else "")
        raise ConfigError(f"{source}: {dotted}={scalar_text(value)} is not {wanted}")
    return value
