"""The laws of the reverse process, applied: samplers and infilling."""

from typing import NamedTuple

TIME_GRIDS = ("uniform", "cosine", "schedule")
DRAW_DTYPES = ("float64", "float32")

AUTOREGRESSIVE = "autoregressive"
MODEL_KINDS = {
    "absorb": "a diffusion model of the graph absorb",
    "uniform": "a diffusion model of the graph uniform",
    AUTOREGRESSIVE: "an autoregressive model",
}
"""Kinds of models by how their samples come about, `LogitModel.kind`, in words."""


class Run(NamedTuple):
    """How a sampler draws from models of one kind.

    Attributes:
        function: "module.function" of this room: it takes a `BatchState` to its end, in place.
        options: the settings that it takes beside `draw_dtype`.
    """

    function: str
    options: tuple[str, ...]


class Sampler(NamedTuple):
    """What there is to know of a sampler.

    Attributes:
        fills: how it draws, by the kind of model.
        steps: by default; None: one network call for each position.
    """

    fills: dict[str, Run]
    steps: int | None = None


_GRID = ("steps", "time_grid", "t_end")
_TOKEN = ("temperature", "top_p", "top_k")  # no law where a token may also stay
_STEPS = {
    "absorb": Run("absorb_steps.run_absorb", (*_GRID, *_TOKEN)),
    "uniform": Run("uniform_steps.run_uniform", _GRID),
}
_ANCESTRAL = {"absorb": Run("absorb_steps.run_absorb", (*_GRID, *_TOKEN, "remask"))}
_HITTING = {"absorb": Run("unmasking.run_first_hitting", ("steps", *_TOKEN))}
_ORDERED = {"absorb": Run("unmasking.run_ordered", (*_GRID, *_TOKEN))}
_PREFIX = {AUTOREGRESSIVE: Run("unmasking.run_left_to_right", _TOKEN)}
SAMPLERS = {
    "analytic": Sampler(_STEPS, steps=128),
    "euler": Sampler(_STEPS, steps=128),
    "ancestral": Sampler(_ANCESTRAL, steps=128),
    "first-hitting": Sampler(_HITTING),
    "confidence": Sampler(_ORDERED),
    "entropy": Sampler(_ORDERED),
    "margin": Sampler(_ORDERED),
    "left-to-right": Sampler(_PREFIX),
}
"""Every sampler by its name."""


def samplers_of(kind: str) -> tuple[str, ...]:
    """Names of the samplers that a kind of model has; the first is the one by default."""
    return tuple(name for name, sampler in SAMPLERS.items() if kind in sampler.fills)
