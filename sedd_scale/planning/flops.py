"""Floating-point operations of training, two ways, and how long a run takes.

A multiplication and an addition count as two operations; only matrix products count. "Required"
runs the head on the rows that have a loss (absorb: masked positions), "dense" on every position.
Attention is bidirectional: L x L products. A backward pass is twice a forward pass.
"""

import math
from dataclasses import dataclass

from sedd_scale.config import Config, NoiseConfig
from sedd_scale.planning.parameters import SIGMA_FEATURES

# Dense matrix-product peaks of one device in FLOP/s by precision (float32 without tensor cores),
# and its memory in bytes; from the makers' data sheets.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "a100": {"bf16": 312e12, "fp32": 19.5e12, "memory": 80e9},
    "h100": {"bf16": 989e12, "fp32": 67e12, "memory": 80e9},
    "h100-pcie": {"bf16": 756e12, "fp32": 51e12, "memory": 80e9},
    "h200": {"bf16": 989e12, "fp32": 67e12, "memory": 141e9},
    "b200": {"bf16": 2250e12, "fp32": 75e12, "memory": 180e9},
    "l40s": {"bf16": 362e12, "fp32": 91.6e12, "memory": 48e9},
}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all ranks, forward and backward.

    Attributes:
        required: the head on the rows that have a loss.
        dense: the head on every position.
        attention: the share of the L x L products, part of both.
        recompute: forward passes done again, part of neither.
        required_per_token: "model FLOPs per token", the ground of MFU.
        dense_per_token: the same with the head on every position.
        head_rows: expected share of positions that have a loss.
    """

    required: float
    dense: float
    attention: float
    recompute: float
    required_per_token: float
    dense_per_token: float
    head_rows: float


def step_flops(config: Config, *, vocab_size: int, block_length: int) -> StepFlops:
    """Count one step of `training.global_batch` sequences."""
    model = config.model
    width, length = model.hidden_size, block_length
    linear = 2 * config.trunk.products
    attention = 4 * length * config.trunk.query_rows
    cond = model.cond_width
    modulation = 2 * cond * 6 * width / length
    block = linear + attention + modulation
    noise = 2 * cond * (SIGMA_FEATURES + cond + 2 * width) / length
    head = 2 * width * vocab_size
    rows = head_rows(config)
    trunk = model.num_layers * block + noise
    tokens = config.training.global_batch * length
    every = config.parallel.recompute_every
    # Selective recomputation keeps every product.
    whole_blocks = every and config.parallel.recompute_mode == "full"
    recomputed = len(range(0, model.num_layers, every)) if whole_blocks else 0
    return StepFlops(
        required=3 * tokens * (trunk + rows * head),
        dense=3 * tokens * (trunk + head),
        attention=3 * tokens * model.num_layers * attention,
        recompute=tokens * recomputed * block,
        required_per_token=3 * (trunk + rows * head),
        dense_per_token=3 * (trunk + head),
        head_rows=rows,
    )


def head_rows(config: Config) -> float:
    """Expected share of positions that have a loss, over the times training draws."""
    if not config.graph.facts.has_mask or config.training.objective == "autoregressive":
        return 1.0
    start, panels = config.noise.t_min, 4096
    width = (1.0 - start) / panels
    middles = (start + (panel + 0.5) * width for panel in range(panels))
    return sum(move_probability(config.noise, t) for t in middles) / panels


def move_probability(noise: NoiseConfig, t: float) -> float:
    """Probability that the noise has touched a token by time t, as diffusion/schedules.py has it.

    Source: Lou et al., appendix C; arXiv 2406.07524, appendix E.
    """
    if noise.name == "loglinear":
        return (1.0 - noise.eps) * t
    if noise.name == "cosine":
        return 2.0 * (1.0 - noise.eps) * math.sin(math.pi / 4 * t) ** 2
    if noise.name == "geometric":
        return -math.expm1(-(noise.sigma_min ** (1.0 - t)) * noise.sigma_max**t)
    assert noise.name == "linear", noise.name
    return -math.expm1(-noise.sigma_max * t)


def run_seconds(flops: StepFlops, *, steps: int, gpus: int, peak: float, mfu: float) -> float:
    """Seconds that `steps` steps take at a model FLOPs utilisation `mfu` of `peak` FLOP/s a GPU.

    The required FLOPs count, so that recomputation lowers the utilisation that can be reached.
    """
    return steps * flops.required / (gpus * peak * mfu)
