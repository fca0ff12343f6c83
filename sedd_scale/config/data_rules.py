"""Mixtures of datasets that cannot be trained on, each refused with the keys and the fix."""

from typing import Any

from sedd_scale.config.sections import DataConfig
from sedd_scale.errors import ConfigError

FORMS = ({"path", "weight"}, {"path", "tokens"})
EXAMPLE = "[{path: DIR, weight: 3}, {path: DIR, weight: 1}]"


def check_data(data: DataConfig) -> None:
    """Raise ConfigError for the first thing wrong with data.mixture and data.stages."""
    if data.path == "":
        raise ConfigError("data.path is empty: give a prepared dataset")
    if data.mixture is None:
        if data.stages is not None:
            raise ConfigError(
                f"data.stages={data.stages} has no effect without data.mixture: remove it"
            )
        return
    if data.path is not None:
        raise ConfigError(
            f"data.path={data.path} and data.mixture are both given: set data.path=null"
        )
    measure = _check_mixture(data.mixture)
    if data.stages is None:
        return
    if measure == "tokens":
        raise ConfigError(
            "data.stages changes weights, but data.mixture gives tokens: give weights, or remove "
            "data.stages"
        )
    last = 0
    for place, stage in enumerate(data.stages):
        where = f"data.stages[{place}]"
        if not isinstance(stage, dict) or set(stage) != {"step", "weights"}:
            raise ConfigError(f"{where}={stage!r} is not of the form {{step: 1000, weights: [1]}}")
        if type(stage["step"]) is not int or stage["step"] <= last:
            raise ConfigError(f"{where}.step={stage['step']} has to be an integer above {last}")
        last = stage["step"]
        weights = stage["weights"]
        if not isinstance(weights, list) or len(weights) != len(data.mixture):
            raise ConfigError(
                f"{where}.weights={weights!r} is not a list of {len(data.mixture)} numbers, "
                "one for each dataset of data.mixture"
            )
        for weight in weights:
            _check_number(f"{where}.weights", weight, at_least_zero=True)
        if sum(weights) == 0:
            raise ConfigError(f"{where}.weights={weights!r} has to hold one above 0")


def _check_mixture(mixture: list[Any]) -> str:
    """`weight` or `tokens`, whichever all entries give."""
    if not mixture:
        raise ConfigError(f"data.mixture=[] names no dataset: give such as {EXAMPLE}")
    measures = set()
    for place, entry in enumerate(mixture):
        where = f"data.mixture[{place}]"
        if not isinstance(entry, dict) or set(entry) not in FORMS:
            raise ConfigError(f"{where}={entry!r} is not of the form of {EXAMPLE}, or with tokens")
        if not isinstance(entry["path"], str) or not entry["path"]:
            raise ConfigError(f"{where}.path={entry['path']!r} is not a path")
        measure = "weight" if "weight" in entry else "tokens"
        # A dataset may wait for a later stage.
        _check_number(f"{where}.{measure}", entry[measure], at_least_zero=measure == "weight")
        measures.add(measure)
    if len(measures) > 1:
        raise ConfigError("data.mixture gives weights and tokens: give one of them to all datasets")
    if measures == {"weight"} and sum(entry["weight"] for entry in mixture) == 0:
        raise ConfigError("the weights of data.mixture are all 0: give one above 0")
    return measures.pop()


def _check_number(key: str, value: Any, *, at_least_zero: bool) -> None:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ConfigError(f"{key}={value!r} is not a positive number")
    if value == 0 and not at_least_zero:
        raise ConfigError(f"{key}={value!r} has to be above 0")
