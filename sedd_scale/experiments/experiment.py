"""What a comparison trains: one run's configuration, variants of it and seeds, from a YAML file.

    title: ...                  of the report
    baseline: NAME              the variant that ratios are over
    seeds: [0, 1]
    jobs: 2                     runs at a time
    threads: 1                  of each
    data: {tokenizer: text8, block_length: 128, valid_fraction: 0.05}
    evaluation: {max_blocks: 256, draws: 8, batch_size: 64}
    run: {model: {...}, optimizer: {...}, training: {...}, ...}
    variants:
      NAME: {section.key: value, ...}
      OTHER: {starts_from: NAME, section.key: value, ...}

`run` is a configuration as `sedd-scale train` takes it, without a dataset. A variant that
`starts_from` one before it begins with the weights of that one's run of the same seed, as
`model.init_from` does. The tokens of that run are not counted, so its steps may be others.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sedd_scale.config import Config, config_from_dict
from sedd_scale.config.shipped import find_config
from sedd_scale.config.yaml_text import read_yaml, scalar_text
from sedd_scale.errors import ConfigError

_KEYS = ("title", "baseline", "seeds", "jobs", "threads", "data", "evaluation", "run", "variants")
STARTS_FROM = "starts_from"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class DataSettings:
    """How text becomes the dataset, as arguments of `prepare`."""

    tokenizer: str = "text8"
    block_length: int = 128
    valid_fraction: float = 0.05
    vocab_size: int | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """How every run is evaluated, as options of `sedd-scale eval_ppl`."""

    max_blocks: int = 256
    draws: int = 8
    batch_size: int = 64


@dataclass(frozen=True)
class Experiment:
    """A comparison.

    Attributes:
        title: of the report.
        variants: name -> the whole configuration of its runs, but for dataset and seed.
        changes: name -> what the variant changes of the common run, as `section.key=value`.
        baseline: the variant that ratios are over.
        seeds: each variant is trained once for each.
        jobs: runs at a time.
        threads: of each run; None: PyTorch's own choice.
        starts: name -> the variant whose run it begins with; without those that begin with none.
    """

    title: str
    variants: dict[str, Config]
    changes: dict[str, list[str]]
    baseline: str
    seeds: list[int]
    data: DataSettings
    evaluation: EvaluationSettings
    jobs: int
    threads: int | None
    starts: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_per_run(self) -> int:
        """Positions that each run trains on, but for those that others start from."""
        return self.tokens_of(self.baseline)

    def tokens_of(self, name: str) -> int:
        """Positions that a run of the variant trains on."""
        training = self.variants[name].training
        return training.steps * training.global_batch * self.data.block_length

    def only(self, names: Collection[str]) -> "Experiment":
        """The experiment of these variants, the baseline and what they start from."""
        kept = {self.baseline, *names}
        for name in reversed(self.variants):
            if name in kept and name in self.starts:
                kept.add(self.starts[name])
        variants = {name: config for name, config in self.variants.items() if name in kept}
        starts = {name: start for name, start in self.starts.items() if name in kept}
        return replace(self, variants=variants, starts=starts)


def load_experiment(path: Path) -> Experiment:
    """Read an experiment and refuse what cannot be run or compared.

    Raises:
        ConfigError: a key that is unknown, missing or of the wrong kind; a variant that cannot run,
            or that is trained on other tokens than the others.
    """
    path = find_config(path)
    tree = read_yaml(path)
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key}; the keys are {', '.join(_KEYS)}")
    common = config_from_dict(_mapping(tree, "run", path))
    changes = {
        str(name): _changes(str(name), keys, path)
        for name, keys in _mapping(tree, "variants", path).items()
    }
    starts = _starts(tree["variants"], path)
    variants = {}
    for name, assignments in changes.items():
        # A stand-in for the path that the other run will have.
        start = [f"model.init_from={starts[name]}"] if name in starts else []
        variants[name] = common.override(*start, *assignments)
    baseline = tree.get("baseline")
    if not isinstance(baseline, str) or baseline not in variants:
        raise ConfigError(
            f"{path}: baseline={baseline} is none of the variants {', '.join(variants)}"
        )
    seeds = tree.get("seeds")
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ConfigError(f"{path}: seeds={seeds} has to be a list of integers such as [0, 1]")
    check_seeds(seeds, f"{path}: seeds={seeds}")
    experiment = Experiment(
        title=str(tree.get("title", path.stem)),
        variants=variants,
        changes=changes,
        starts=starts,
        baseline=baseline,
        seeds=seeds,
        data=_settings(DataSettings, tree, "data", path),
        evaluation=_settings(EvaluationSettings, tree, "evaluation", path),
        jobs=_count(tree.get("jobs", 1), "jobs", path),
        threads=None if tree.get("threads") is None else _count(tree["threads"], "threads", path),
    )
    _check_comparable(experiment, path)
    return experiment


def check_seeds(seeds: Sequence[int], what: str) -> None:
    """Raise ConfigError, which calls them `what`, unless they are different and from 0 on."""
    if min(seeds) < 0:
        raise ConfigError(f"{what} has one below 0: give different seeds from 0 on")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{what} names a seed twice: give different seeds from 0 on")


def _starts(variants: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The variant that each starts from, for those that start from one."""
    starts: dict[str, str] = {}
    before: list[str] = []
    for name, keys in variants.items():
        if keys and STARTS_FROM in keys:
            starts[str(name)] = str(keys[STARTS_FROM])
            if starts[str(name)] not in before:
                raise ConfigError(
                    f"{path}: variant {name} has {STARTS_FROM}={starts[str(name)]}, which is none "
                    f"of the variants before it: {', '.join(before) or 'there are none'}"
                )
        before.append(str(name))
    return starts


def _changes(name: str, keys: Any, path: Path) -> list[str]:
    """What a variant changes, as overrides."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{path}: variant {name!r} cannot name a folder: use letters, digits, _, - and ."
        )
    if keys is not None and not isinstance(keys, Mapping):
        raise ConfigError(f"{path}: variant {name}: has to be a mapping of section.key to values")
    return [
        # An override takes text letter by letter.
        f"{key}={value if isinstance(value, str) else scalar_text(value)}"
        for key, value in (keys or {}).items()
        if key != STARTS_FROM
    ]


def _check_comparable(experiment: Experiment, path: Path) -> None:
    if experiment.evaluation.draws < 2:
        raise ConfigError(
            f"{path}: evaluation.draws={experiment.evaluation.draws} leaves no way to tell a "
            "standard error: give at least 2"
        )
    base = experiment.variants[experiment.baseline]
    if experiment.baseline in experiment.starts.values():
        raise ConfigError(
            f"{path}: baseline={experiment.baseline} is what other variants start from, on tokens "
            "of its own: choose another"
        )
    for name, config in experiment.variants.items():
        try:
            config.validate(1)
        except ConfigError as error:
            raise ConfigError(f"{path}: variant {name}: {error}") from None
        if config.data != base.data or config.data.path is not None:
            raise ConfigError(
                f"{path}: variant {name} sets its own data.*: all are trained on the dataset that "
                "--data names; leave the section out"
            )
        for key in ("steps", "global_batch", "seed"):
            if key == "steps" and name in experiment.starts.values():
                continue  # what others start from is not compared with them
            here, there = getattr(config.training, key), getattr(base.training, key)
            if here != there:
                raise ConfigError(
                    f"{path}: variant {name} has training.{key}={here} and "
                    f"{experiment.baseline} {there}: give all the same, for equal tokens and seeds"
                )


def _mapping(tree: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    value = tree.get(key)
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{path}: {key}: has to be a mapping of keys to values")
    return value


def _settings(kind: type[Any], tree: Mapping[str, Any], key: str, path: Path) -> Any:
    values = tree.get(key) or {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: {key}: has to be a mapping of keys to values")
    defaults = {field.name: field.default for field in fields(kind)}
    for name, value in values.items():
        if name not in defaults:
            raise ConfigError(f"{path}: unknown key {key}.{name}: choose {', '.join(defaults)}")
        default = defaults[name]
        kinds = {int: (int,), float: (int, float), str: (str,), type(None): (int, type(None))}
        if isinstance(value, bool) or not isinstance(value, kinds[type(default)]):
            raise ConfigError(f"{path}: {key}.{name}={value} has another kind than {default}")
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{path}: {key}.{name}={value} has to be above 0")
    return kind(**values)


def _count(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {name}={value} is not a count: give an integer of at least 1")
    return value
