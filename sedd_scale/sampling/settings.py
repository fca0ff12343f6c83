"""How samples are drawn: the sampler, its steps and what changes the law of a token."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sedd_scale.cli import count
from sedd_scale.errors import ConfigError
from sedd_scale.sampling import (
    AUTOREGRESSIVE,
    DRAW_DTYPES,
    MODEL_KINDS,
    SAMPLERS,
    TIME_GRIDS,
    Run,
    samplers_of,
)

T_END = 1e-5


def _option(default: Any, help: str, **options: Any) -> Any:
    """A field: its default, and its flag's sentence and arguments."""
    return field(default=default, metadata={"help": help, **options})


_ONE_A_CALL = ", ".join(name for name in samplers_of("absorb") if SAMPLERS[name].steps is None)


@dataclass(frozen=True)
class SamplerSettings:
    """How a sample is drawn, apart from its seed and its given tokens: a field for each option."""

    sampler: str = _option(
        "analytic",
        f"sampler (analytic; for an autoregressive model {samplers_of(AUTOREGRESSIVE)[0]}, the "
        "only one)",
        choices=tuple(SAMPLERS),
    )
    steps: int | None = _option(
        None,
        "sampling steps, each one network call at most, and a denoising step after them (128); of "
        f"{_ONE_A_CALL} network calls (one for each position)",
        type=count,
        metavar="K",
    )
    time_grid: str = _option(
        "uniform",
        "spacing of the steps: uniform in time, cosine (slow at first, when little is known) or "
        "schedule (equal steps of the move probability) (%(default)s)",
        choices=TIME_GRIDS,
    )
    temperature: float = _option(
        1.0,
        "logits are divided by it; 0: the likeliest token (%(default)s)",
        type=float,
        metavar="T",
    )
    top_p: float = _option(
        1.0,
        "keep the likeliest tokens up to this probability (%(default)s)",
        type=float,
        metavar="P",
    )
    top_k: int | None = _option(
        None, "number of likeliest tokens to keep (all)", type=count, metavar="K"
    )
    remask: float = _option(
        0.0,
        "average number of times a token is masked again, with --sampler ancestral (%(default)s)",
        type=float,
        metavar="R",
    )
    draw_dtype: str = _option(
        "float64",
        "arithmetic of the draws; float32 lowers the temperature a little (%(default)s)",
        choices=DRAW_DTYPES,
    )
    t_end: float = _option(
        T_END,
        "time at which the last, denoising step begins (%(default)s)",
        type=float,
        metavar="T",
    )

    def __post_init__(self) -> None:
        for name, value, known in (
            ("sampler", self.sampler, tuple(SAMPLERS)),
            ("time_grid", self.time_grid, TIME_GRIDS),
            ("draw_dtype", self.draw_dtype, DRAW_DTYPES),
        ):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is unknown: choose {_listed(known)}")
        for name, number in (("steps", self.steps), ("top_k", self.top_k)):
            if number is not None and (type(number) is not int or number < 1):
                raise ConfigError(f"{name}={number} is not a count: give an integer of at least 1")
        for name, real, low, high, open_low in (
            ("temperature", self.temperature, 0.0, math.inf, False),
            ("top_p", self.top_p, 0.0, 1.0, True),
            ("remask", self.remask, 0.0, math.inf, False),
            ("t_end", self.t_end, 0.0, 1.0, True),
        ):
            _check_number(name, real, low, high, open_low)
        if self.t_end >= 1.0:
            raise ConfigError(f"t_end={self.t_end} leaves no step: give a small time such as 1e-5")
        if self.temperature == 0 and (self.top_p < 1.0 or self.top_k is not None):
            raise ConfigError(
                "temperature=0 takes the likeliest token, which top_p and top_k cannot change: "
                "leave them out or raise temperature"
            )
        own = SAMPLERS[self.sampler]
        self._check_options(own.fills.values(), f"sampler {self.sampler}")
        if self.time_grid != "uniform" and own.steps is None and self.steps is None:
            raise ConfigError(
                f"time_grid={self.time_grid} with sampler {self.sampler} needs steps: without, "
                "each step fills one position"
            )

    def check_kind(self, kind: str) -> None:
        """Raise ConfigError for what a kind of model (`LogitModel.kind`) does not have."""
        runs, words = SAMPLERS[self.sampler].fills, MODEL_KINDS[kind]
        if kind not in runs:
            raise ConfigError(
                f"sampler {self.sampler} does not go with {words}: choose "
                f"{_listed(samplers_of(kind))}"
            )
        self._check_options([runs[kind]], f"sampler {self.sampler} of {words}")

    def _check_options(self, runs: Collection[Run], words: str) -> None:
        """Refuse options that none of the runs takes."""
        known = {"sampler", "draw_dtype", *(name for run in runs for name in run.options)}
        for key in fields(self):
            value = getattr(self, key.name)
            if key.name not in known and value != key.default:
                raise ConfigError(f"{key.name}={value} does not go with {words}: leave it out")

    @property
    def resolved_steps(self) -> int | None:
        """`steps`, with None resolved where it does not depend on the sample."""
        return SAMPLERS[self.sampler].steps if self.steps is None else self.steps

    def to_dict(self) -> dict[str, Any]:
        """Option -> value, of plain types, for a record; `settings_from_dict` reads it."""
        return asdict(self)


def settings_from_dict(options: Mapping[str, Any]) -> SamplerSettings:
    """Settings of named options; ConfigError for an unknown one or a value that cannot be used."""
    known = [key.name for key in fields(SamplerSettings)]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown sampler option {name!r}: the options are {_listed(known)}")
    return SamplerSettings(**options)


def _check_number(name: str, number: Any, low: float, high: float, open_low: bool) -> None:
    if type(number) not in (int, float) or not math.isfinite(number):
        raise ConfigError(f"{name}={number!r} is not a number")
    if number < low or number > high or (open_low and number == low):
        limits = f"above {low:g}" if open_low else f"at least {low:g}"
        limits += "" if math.isinf(high) else f" and at most {high:g}"
        raise ConfigError(f"{name}={number} has to be {limits}: change it")


def _listed(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
