"""Values and combinations of values that cannot run, each refused with the keys and the fix."""

import importlib.util
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from sedd_scale.config.data_rules import check_data
from sedd_scale.config.tree import ConfigTree
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.errors import ConfigError

LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", lambda value, limit: value >= limit),
    "at_most": ("at most", lambda value, limit: value <= limit),
    "above": ("above", lambda value, limit: value > limit),
    "below": ("below", lambda value, limit: value < limit),
}


def check_value(key: str, metadata: Mapping[str, Any], value: Any) -> None:
    """Refuse a value outside of the choices or the limits that its field's metadata states."""
    if metadata["choices"] and value not in metadata["choices"]:
        known = [str(choice) for choice in metadata["choices"]]
        guess = get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key}={value} is not one of {', '.join(known)}; did you mean {guess}?")
    for name, limit in metadata["limits"].items():
        words, holds = LIMITS[name]
        if value is not None and not holds(value, limit):
            raise ConfigError(f"{key}={value} has to be {words} {limit}: change it")


def check_combinations(config: ConfigTree) -> None:
    """Raise ConfigError for the first combination that no number of processes can run."""
    _check_effects(config)
    _check_model(config)
    _check_objective(config)
    _check_parallel(config)
    _check_noise(config)
    _check_optimizer(config)
    _check_batch(config)
    _check_guards(config)
    check_data(config.data)


def _check_effects(config: ConfigTree) -> None:
    """Refuse a key that was set and has no effect with the others as they are."""
    for key, field, value in config.all_keys():
        if value == field.default:
            continue
        for other, needed in field.metadata["only_with"].items():
            now = config.value(other)
            if now not in needed:
                raise ConfigError(
                    f"{key}={scalar_text(value)} has no effect with {other}={scalar_text(now)}: "
                    f"leave it out or set {other}={' or '.join(map(scalar_text, needed))}"
                )


def _check_multiple(config: ConfigTree, key: str, of: str, fix: str) -> None:
    """Refuse a key whose value is not a multiple of another's."""
    values = config.to_dict()
    number, divisor = (values[name.partition(".")[0]][name.partition(".")[2]] for name in (key, of))
    if number % divisor:
        raise ConfigError(f"{key}={number} is not a multiple of {of}={divisor}: {fix}")


def _check_model(config: ConfigTree) -> None:
    model, precision = config.model, config.training.precision
    if model.head_dim is None:
        fix = "change one of them or set model.head_dim"
        _check_multiple(config, "model.hidden_size", "model.num_heads", fix)
    if model.num_kv_heads is not None:
        _check_multiple(config, "model.num_heads", "model.num_kv_heads", "change one of them")
    _check_positions(config)
    if model.conditioning == "none" and model.time_conditioning:
        raise ConfigError(
            "model.conditioning=none leaves nothing that sigma could condition, but "
            "model.time_conditioning=true: set model.time_conditioning=false"
        )
    sigma_is_known = config.resolved_scale_by_sigma or model.parametrisation == "mean"
    if not model.time_conditioning and not sigma_is_known:
        raise ConfigError(
            f"model.time_conditioning=false with graph.name={config.graph.name}, "
            f"model.scale_by_sigma={str(config.resolved_scale_by_sigma).lower()} and "
            f"model.parametrisation={model.parametrisation} leaves scores no way to depend on "
            "sigma: set model.time_conditioning=true, model.parametrisation=mean, or "
            "graph.name=absorb with model.scale_by_sigma=true"
        )
    if model.residual_dtype == "bf16" and precision == "fp32":
        raise ConfigError(
            "model.residual_dtype=bf16 with training.precision=fp32 would lose precision "
            "between layers: set model.residual_dtype=fp32 or training.precision=bf16"
        )
    if model.attention == "flash" and precision == "fp32":
        raise ConfigError(
            "model.attention=flash has no training.precision=fp32: set model.attention=sdpa "
            "or training.precision=bf16"
        )
    if model.attention == "flash" and config.training.anneal_steps:
        raise ConfigError(
            f"model.attention=flash has no mask for training.anneal_steps="
            f"{config.training.anneal_steps}: set model.attention=auto"
        )
    if model.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention=flash needs the package flash-attn, which is not installed: "
            "pip install 'sedd_scale[flash]' or set model.attention=sdpa"
        )
    if model.init_from == "":
        raise ConfigError("model.init_from is empty: set it to null or to a checkpoint's path")
    about_it = {
        "grow_vocab=true": model.grow_vocab,
        f"init_options={model.init_options}": model.init_options is not None,
        "calibrate_head=true": model.calibrate_head,
    }
    for what, given in about_it.items():
        if given and model.init_from is None:
            raise ConfigError(
                f"model.{what} has no effect with model.init_from=null: set model.init_from to "
                "the checkpoint that it is about, or leave it out"
            )
    if model.init_from is not None and config.training.resume not in ("auto", "never"):
        raise ConfigError(
            f"model.init_from={model.init_from} starts a new run and "
            f"training.resume={config.training.resume} continues another: set one of them to "
            "its default"
        )


def _check_positions(config: ConfigTree) -> None:
    model, length = config.model, config.data.block_length
    if model.positions == "rotary" and config.trunk.head_dim % 2:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} over model.num_heads={model.num_heads} "
            f"gives heads of odd width {config.trunk.head_dim}, which rotary embedding cannot "
            "turn: change one of them to make it even"
            if model.head_dim is None
            else f"model.head_dim={model.head_dim} is odd, and rotary embedding cannot turn it: "
            "make it even"
        )
    if 0 < model.rotary_base < 1:
        raise ConfigError(
            f"model.rotary_base={model.rotary_base} would turn later entries faster: give at least "
            "1, or 0 for no positions"
        )
    if model.rotary_scaling != "none" and model.rotary_original_length is None:
        raise ConfigError(
            f"model.rotary_scaling={model.rotary_scaling} needs to know the length first trained "
            "on: set model.rotary_original_length"
        )
    if model.positions == "learned" and model.max_positions is None:
        raise ConfigError(
            "model.positions=learned needs to know how many there are: set model.max_positions"
        )
    if model.max_positions is not None and (length or 0) > model.max_positions:
        raise ConfigError(
            f"data.block_length={length} is longer than the model.max_positions="
            f"{model.max_positions} of model.positions=learned: change one of them"
        )


def _check_objective(config: ConfigTree) -> None:
    objective, has_mask = config.training.objective, config.graph.facts.has_mask
    normalised = None
    if objective != "score_entropy":
        normalised = f"training.objective={objective}"
        if not has_mask:
            raise ConfigError(
                f"{normalised} needs a mask, which graph.name={config.graph.name} does not have: "
                "set graph.name=absorb or training.objective=score_entropy"
            )
    elif config.model.parametrisation == "mean" and has_mask:
        normalised = "model.parametrisation=mean"
    if normalised is not None and config.model.scale_by_sigma is False:
        raise ConfigError(
            f"{normalised} learns normalised scores, but model.scale_by_sigma=false: set "
            "model.scale_by_sigma=null"
        )


def _check_parallel(config: ConfigTree) -> None:
    model, parallel = config.model, config.parallel
    fix = "set parallel.tensor to a divisor of it"
    _check_multiple(config, "model.num_heads", "parallel.tensor", fix)
    if model.num_kv_heads is not None:
        _check_multiple(config, "model.num_kv_heads", "parallel.tensor", fix)
    if config.trunk.inner % parallel.tensor:
        raise ConfigError(
            f"model.ffn_hidden_size={config.trunk.inner} is not a multiple of "
            f"parallel.tensor={parallel.tensor}: {fix}"
        )
    if parallel.pipeline > model.num_layers:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} is more stages than "
            f"model.num_layers={model.num_layers}: set parallel.pipeline<={model.num_layers}"
        )
    if parallel.pipeline > 1 and parallel.zero_stage > 1:
        raise ConfigError(
            f"parallel.pipeline={parallel.pipeline} does not go with "
            f"parallel.zero_stage={parallel.zero_stage}: set parallel.zero_stage=1 or "
            "parallel.pipeline=1"
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true needs parallel.tensor>1, but parallel.tensor=1: "
            "set parallel.sequence_parallel=false or raise parallel.tensor"
        )
    if parallel.sequence_parallel and config.data.block_length:
        fix = "change one of them or set parallel.sequence_parallel=false"
        _check_multiple(config, "data.block_length", "parallel.tensor", fix)
    if parallel.recompute_every > model.num_layers:
        raise ConfigError(
            f"parallel.recompute_every={parallel.recompute_every} is more than "
            f"model.num_layers={model.num_layers}: set it to 0 (none), 1 (every block) or "
            f"at most {model.num_layers}"
        )


def _check_noise(config: ConfigTree) -> None:
    noise = config.noise
    if config.model.scale_by_sigma and not config.graph.facts.scales_by_sigma:
        raise ConfigError(
            f"graph.name={config.graph.name} has no scaled parametrisation, but "
            "model.scale_by_sigma=true: set model.scale_by_sigma=null or graph.name=absorb"
        )
    if noise.name == "geometric" and noise.sigma_min >= noise.sigma_max:
        raise ConfigError(
            f"noise.sigma_min={noise.sigma_min} is not below "
            f"noise.sigma_max={noise.sigma_max} (noise.name=geometric): lower noise.sigma_min"
        )


def _check_optimizer(config: ConfigTree) -> None:
    optimizer, steps = config.optimizer, config.training.steps
    schedule, warmup, decay = optimizer.schedule, optimizer.warmup_steps, optimizer.decay_steps
    if schedule == "wsd" and decay == 0:
        raise ConfigError(
            "optimizer.schedule=wsd needs a final decay, but optimizer.decay_steps=0: "
            "set optimizer.decay_steps>0 or optimizer.schedule=constant"
        )
    if schedule == "wsd" and warmup + decay > steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} + optimizer.decay_steps={decay} is more than "
            f"training.steps={steps} of optimizer.schedule=wsd: lower them or raise training.steps"
        )
    if schedule == "cosine" and warmup >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={warmup} leaves nothing of training.steps={steps} for "
            "optimizer.schedule=cosine: lower optimizer.warmup_steps"
        )


def _check_batch(config: ConfigTree) -> None:
    fix = "change one of them"
    _check_multiple(config, "training.global_batch", "training.micro_batch", fix)
    if config.checkpoint.keep_every and not config.checkpoint.keep:
        raise ConfigError(
            f"checkpoint.keep_every={config.checkpoint.keep_every} has no effect with "
            "checkpoint.keep=0, which keeps all: set checkpoint.keep_every=0 or "
            "checkpoint.keep>0"
        )
    if not config.training.resume:
        raise ConfigError("training.resume is empty: set it to auto, never or a path")


def _check_guards(config: ConfigTree) -> None:
    training = config.training
    for item in training.skip_steps or ():
        ends = item if isinstance(item, list) else [item, item]
        if len(ends) != 2 or any(type(end) is not int for end in ends):
            raise ConfigError(
                f"training.skip_steps holds {item!r}, which is neither a step nor a range: write "
                "each as N or [first, last]"
            )
        if not 1 <= ends[0] <= ends[1]:
            raise ConfigError(
                f"training.skip_steps holds {item!r}, which is not a step of a run: steps count "
                "from 1, and a range goes from its first to its last step"
            )
    if training.hang_factor and training.hang_slow < training.hang_floor:
        raise ConfigError(
            f"training.hang_slow={training.hang_slow} is less than "
            f"training.hang_floor={training.hang_floor}: the first step, validations and saves "
            "need at least as long as a step; raise training.hang_slow"
        )
