"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

import math

from sedd_scale.config import Config, OptimizerConfig


def learning_rate(step: int, optimizer_config: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of the update that follows `step` earlier ones.

    Linear warm-up, lr * (step + 1) / warmup_steps, reaches lr at its last update (Lou et al.,
    arXiv 2310.16834); no update is spent at rate zero. Then:

    * constant: lr for good;
    * cosine: half a cosine from lr towards lr * min_lr_ratio at `total_steps`
      (Loshchilov and Hutter, arXiv 1608.03983);
    * wsd: lr until the last `decay_steps`, then linear towards lr * min_lr_ratio at `total_steps`
      (warm-up, stable, decay; Hu et al., arXiv 2404.06395).

    Args:
        step: optimizer updates already made; the first update has step 0.
        optimizer_config: lr, schedule, warmup_steps, decay_steps, min_lr_ratio.
        total_steps: updates of the whole run.
    """
    peak, floor = optimizer_config.lr, optimizer_config.min_lr_ratio
    warmup = optimizer_config.warmup_steps
    if step + 1 < warmup:
        return peak * (step + 1) / warmup
    if optimizer_config.schedule == "constant":
        return peak
    if optimizer_config.schedule == "cosine":
        fraction = _clamp((step - warmup) / max(1, total_steps - warmup))
        return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * fraction)))
    assert optimizer_config.schedule == "wsd", optimizer_config.schedule
    left = _clamp((total_steps - step) / max(1, optimizer_config.decay_steps))
    return peak * (floor + (1.0 - floor) * left)


def unreached_rate(config: Config) -> str | None:
    """A note where the run ends before the warm-up does, and so before its learning rate is lr."""
    warmup, steps = config.optimizer.warmup_steps, config.training.steps
    if warmup <= steps:
        return None
    highest = learning_rate(steps - 1, config.optimizer, steps)
    return (
        f"note: optimizer.warmup_steps={warmup} is more than training.steps={steps}: the learning "
        f"rate ends at {highest:.3g}, below optimizer.lr={config.optimizer.lr:g}"
    )


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, value))
