"""Sampling steps of the absorbing graph, beside the textbook sampler with the same network and law.

The textbook side makes the head's product for every position with a plain linear map, computes the
probability of every state in float64 and draws each position from its row. A step's cost depends on
how many masks are left, so the timed steps are spread evenly over the trajectory, each from tokens
noised to its own time; `--timed-steps` equal to `--steps` times them all.
"""

import argparse
import functools
from typing import TYPE_CHECKING, Any

from sedd_scale.benchmark.arguments import add_measured_arguments
from sedd_scale.benchmark.report import environment, run_measured, side_by_side
from sedd_scale.cli import add_command

if TYPE_CHECKING:
    from torch import Tensor

    from sedd_scale.model.score_model import ScoreModel
    from sedd_scale.sampling.time_grid import Step


def add_arguments(subparsers: Any) -> None:
    """Register `sample` and its options."""
    parser = add_command(
        subparsers,
        "sample",
        help="sampling steps, beside the textbook sampler",
        example="sedd-scale benchmark sample --timed-steps 4 --json",
    )
    add = parser.add_argument
    add("--model", default="small", help="of configs/models, or a YAML file (default: small)")
    add("--batch-size", type=int, default=4, help="samples drawn together (default: 4)")
    add(
        "--length",
        dest="block_length",
        type=int,
        default=256,
        help="positions of a sample (default: 256)",
    )
    add("--vocab-size", type=int, default=50257, help="tokens N (default: 50257)")
    add("--steps", type=int, default=64, help="steps of the trajectory (default: 64)")
    add("--timed-steps", type=int, default=8, help="of these, evenly spread (default: 8)")
    add("--sampler", choices=("analytic", "ancestral"), default="analytic")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    add_measured_arguments(parser, repeats=1)
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure), accumulate=1)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides' seconds and memory.

    Raises:
        ConfigError: a model without masks, or more timed steps than steps.
    """
    import torch

    from sedd_scale.benchmark.measure import median_seconds, peak_bytes
    from sedd_scale.benchmark.synthetic import synthetic_config
    from sedd_scale.errors import ConfigError
    from sedd_scale.model.score_model import ScoreModel
    from sedd_scale.parallel.layout import initialize_layout
    from sedd_scale.sampling.absorb_steps import ancestral_step, score_step
    from sedd_scale.sampling.samplers import start_batch
    from sedd_scale.sampling.settings import SamplerSettings
    from sedd_scale.sampling.time_grid import time_steps

    config = synthetic_config(arguments, world_size=1)
    if not config.graph.facts.has_mask:
        raise ConfigError(f"graph.name={config.graph.name} has no masks to fill: choose absorb")
    steps, timed = arguments.steps, arguments.timed_steps
    if not 1 <= timed <= steps:
        raise ConfigError(f"--timed-steps {timed} is not in 1..{steps}: give at most --steps")
    layout = initialize_layout()
    model = ScoreModel(config, arguments.vocab_size, layout, block_length=arguments.block_length)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    model = model.to(device=layout.device, dtype=dtype)
    batch_size, length = arguments.batch_size, arguments.block_length
    generator = torch.Generator().manual_seed(0)
    blank_BL = torch.zeros(batch_size, length, dtype=torch.int64)
    clean_BL = torch.randint(arguments.vocab_size, blank_BL.shape, generator=generator)
    settings = SamplerSettings(arguments.sampler, steps=steps)
    grid = time_steps(model.schedule, steps, settings.time_grid, settings.t_end)
    chosen = [grid[(2 * k + 1) * steps // (2 * timed)] for k in range(timed)]
    # Tokens noised to the time of each step, as a trained model would have them.
    noise_BL = torch.rand(blank_BL.shape, generator=generator, dtype=torch.float64)
    states = [
        clean_BL.masked_fill(noise_BL < step.move_t, arguments.vocab_size).to(model.device)
        for step in (grid[0], *chosen)
    ]

    def ours(step: "Step", state_BL: "Tensor") -> None:
        batch = start_batch(model, blank_BL, blank_BL.bool(), settings)
        batch.state_BL.copy_(state_BL)
        if settings.sampler == "ancestral":
            ancestral_step(batch, step, batch.masked_R())
        else:
            log_sum_R = torch.zeros(batch.flat_R.shape, dtype=torch.float64, device=model.device)
            score_step(batch, step, batch.masked_R(), log_sum_R)

    def textbook(step: "Step", state_BL: "Tensor") -> None:
        uniform_BL = torch.rand(state_BL.shape, dtype=torch.float64).to(model.device)
        textbook_step(model, state_BL, step, uniform_BL, sampler=settings.sampler)

    def all_steps(side: Any) -> None:
        for step, state_BL in zip(chosen, states[1:]):
            side(step, state_BL)

    with torch.no_grad():
        # The first step has the most masks, and so needs the most memory.
        extra = [
            peak_bytes(functools.partial(side, grid[0], states[0])) / 1e6
            for side in (ours, textbook)
        ]
        seconds = median_seconds(
            [lambda: all_steps(ours), lambda: all_steps(textbook)],
            repeats=arguments.repeats,
            warm_up=0,
        )
    seconds = [part * steps / timed for part in seconds]
    return {
        "part": "sample",
        "sampler": settings.sampler,
        "batch": batch_size,
        "length": length,
        "vocab": arguments.vocab_size,
        "steps": steps,
        "timed_steps": timed,
        "dtype": arguments.precision,
        "repeats": arguments.repeats,
        **side_by_side(seconds, extra, tokens=batch_size * length),
        **environment(),
    }


def textbook_step(
    model: "ScoreModel",
    state_BL: "Tensor",
    step: "Step",
    uniform_BL: "Tensor",
    *,
    sampler: str,
) -> "Tensor":
    """The tokens after one step, from probabilities [B, L, V] of every state and position.

    Args:
        uniform_BL: float64 in [0, 1).
        sampler: "analytic" (arXiv 2310.16834, section 4) or "ancestral" (arXiv 2406.07524).
    """
    import torch

    mask = model.graph.num_tokens
    sigma_B = step.sigma_t.to(model.device).expand(len(state_BL))
    hidden_LBH = model.network.hidden(state_BL, sigma_B)
    head = model.network.head.linear
    logits_BLV = torch.nn.functional.linear(hidden_LBH.transpose(0, 1), head.weight, head.bias)
    chance_BLV = model.law.log_scores(logits_BLV[..., : mask + 1], state_BL, sigma_B).double()
    if sampler == "ancestral" or step.is_last:
        chance_BLV[..., mask] = -torch.inf
        leave = 1.0 - float(step.move_s / step.move_t)
        chance_BLV = torch.softmax(chance_BLV, dim=-1).mul_(leave)
    else:
        chance_BLV.exp_().mul_(float(torch.expm1(step.sigma_t - step.sigma_s)))
        chance_BLV[..., mask] = 0.0
    chance_BLV[..., mask] = (1.0 - chance_BLV.sum(dim=-1)).clamp(min=0.0)
    cumulative_BLV = chance_BLV.cumsum(dim=-1)
    height_BL1 = uniform_BL[..., None] * cumulative_BLV[..., -1:]
    drawn_BL = torch.searchsorted(cumulative_BLV, height_BL1, right=True).squeeze(-1)
    return torch.where(state_BL == mask, drawn_BL.clamp(max=mask), state_BL)
