"""What a checkpoint without a configuration does not say, and is assumed.

Sizes follow from the shapes of tensors. The graph, the noise and the block length do not.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Assumptions:
    """One field a thing that shapes cannot tell; None takes the format's default.

    Attributes:
        graph: absorb or uniform; absorb.
        noise: the noise schedule; loglinear.
        sigma_min, sigma_max: of the geometric schedule; 1e-4 and 20.
        eps: of the others; 1e-3.
        block_length: L of its training; 1024.
        num_heads: attention heads; from the rotary frequencies, else one per 64 of width.
        scale_by_sigma: the scaled parametrisation; true for absorb, false for uniform.
        time_conditioning: whether outputs depend on sigma; true, but false for mdlm with absorb.
    """

    graph: str | None = None
    noise: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    eps: float | None = None
    block_length: int | None = None
    num_heads: int | None = None
    scale_by_sigma: bool | None = None
    time_conditioning: bool | None = None

    def given(self) -> list[str]:
        """Names of the fields that were set."""
        return [item.name for item in fields(self) if getattr(self, item.name) is not None]

    def overrides(self) -> list[str]:
        """The fields that were set as dotted overrides of a configuration."""
        return [f"{_KEYS[name]}={str(getattr(self, name)).lower()}" for name in self.given()]


_KEYS = {
    "graph": "graph.name",
    "noise": "noise.name",
    "sigma_min": "noise.sigma_min",
    "sigma_max": "noise.sigma_max",
    "eps": "noise.eps",
    "block_length": "data.block_length",
    "num_heads": "model.num_heads",
    "scale_by_sigma": "model.scale_by_sigma",
    "time_conditioning": "model.time_conditioning",
}
