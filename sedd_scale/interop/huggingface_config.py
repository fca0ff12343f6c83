"""config.json of the autoregressive models of transformers, as keys of ours and back.

Both spellings are read: that of transformers 4 (`rope_theta`, `rope_scaling`) and that of 5
(`rope_parameters`). What is written is the older one, which both read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.config import Config, config_from_dict
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.diffusion.objectives import Autoregressive
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.same_network import differences


class Architecture(NamedTuple):
    """One kind of network that transformers has.

    Attributes:
        class_name: of its model there.
        keys: ours, and theirs that says it.
        fixed: of ours, what all such networks have.
        defaults: of theirs, what a config.json without the key means.
        computed: of theirs, the values that make no other network, the first the usual one.
    """

    class_name: str
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    computed: Mapping[str, tuple[Any, ...]]


_KEYS = {
    "model.vocab_size": "vocab_size",
    "model.hidden_size": "hidden_size",
    "model.num_layers": "num_hidden_layers",
    "model.num_heads": "num_attention_heads",
    "model.num_kv_heads": "num_key_value_heads",
    "model.head_dim": "head_dim",
    "model.ffn_hidden_size": "intermediate_size",
    "model.norm_epsilon": "rms_norm_eps",
    "model.tied_embedding": "tie_word_embeddings",
    "data.block_length": "max_position_embeddings",
}
_BIASES = {"model.qkv_bias": "attention_bias", "model.attention_out_bias": "attention_bias"}
# What all networks of such a source have, and what is learned.
_ALL: dict[str, Any] = {
    "training.objective": Autoregressive.name,
    "training.shift": True,
    "graph.name": "absorb",
    "model.conditioning": "none",
    "model.time_conditioning": False,
    "model.head_bias": False,
    "model.dropout": 0.0,
}
_LLAMA: dict[str, Any] = {
    **_ALL,
    "model.norm": "rmsnorm",
    "model.activation": "swiglu",
    "model.mlp_bias": False,
}
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_SILU = {"hidden_act": ("silu", "swish")}
# Of Qwen: some layers see a window alone.
_WINDOWS = {**_SILU, "use_sliding_window": (False, None)}

ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        {**_KEYS, **_BIASES, "model.mlp_bias": "mlp_bias"},
        {key: value for key, value in _LLAMA.items() if key != "model.mlp_bias"},
        {**_DEFAULTS, "max_position_embeddings": 2048},
        _SILU,
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        _KEYS,
        _LLAMA,
        {**_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
        _SILU,
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        _KEYS,
        {**_LLAMA, "model.qkv_bias": True},
        {**_DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
        _WINDOWS,
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        {**_KEYS, **_BIASES},
        {**_LLAMA, "model.qk_norm": True},
        {
            **_DEFAULTS,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
        },
        _WINDOWS,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "model.vocab_size": "vocab_size",
            "model.hidden_size": "n_embd",
            "model.num_layers": "n_layer",
            "model.num_heads": "n_head",
            "model.ffn_hidden_size": "n_inner",
            "model.norm_epsilon": "layer_norm_epsilon",
            "model.tied_embedding": "tie_word_embeddings",
            "model.max_positions": "n_positions",
        },
        {
            **_ALL,
            "model.norm": "layernorm",
            "model.norm_bias": True,
            "model.activation": "gelu",
            "model.qkv_bias": True,
            "model.attention_out_bias": True,
            "model.mlp_bias": True,
            "model.positions": "learned",
        },
        {
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "n_positions": 1024,
        },
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
}
"""Every architecture that is read and written, by its model_type."""


def is_causal_lm(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an autoregressive model of transformers, known here or not."""
    names = raw.get("architectures") or []
    names = [*names, *(raw.get("auto_map") or {})]
    return raw.get("model_type") in ARCHITECTURES or any(
        str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names
    )


def config_of(file: Path, raw: Mapping[str, Any]) -> Config:
    """The configuration of the network that a config.json describes.

    Args:
        file: what errors name.

    Raises:
        CheckpointError: an architecture that is not known here, or a part that networks here lack.
    """
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        own_code = ", which needs code of its own (auto_map)" if raw.get("auto_map") else ""
        raise CheckpointError(
            f"{file} says model_type={kind}{own_code}: models of {', '.join(ARCHITECTURES)} can be "
            "read"
        )
    row = ARCHITECTURES[kind]
    names = raw.get("architectures") or [row.class_name]
    if row.class_name not in names:
        raise CheckpointError(
            f"{file} says architectures={names[0]}, which is no language model: give a "
            f"{row.class_name}"
        )
    for name in raw.get("auto_map") or {}:
        if name.startswith("AutoModel"):
            why = f"its code may differ; take it out if that computes what {row.class_name} does"
            raise _refusal(file, "auto_map", name, why)
    for key, values in row.computed.items():
        given = raw.get(key, values[0])
        if given not in values:
            raise _refusal(file, key, given, f"only {scalar_text(values[0])} is computed here")
    _check_parts(file, raw)
    sections: dict[str, dict[str, Any]] = {}
    said = {ours: _value(file, raw, row, theirs) for ours, theirs in row.keys.items()}
    said |= dict(row.fixed)
    if kind == "gpt2":
        said["data.block_length"] = said["model.max_positions"]
    else:
        said |= _rotary(file, raw, said["data.block_length"])
    for dotted, value in said.items():
        section, _, key = dotted.partition(".")
        sections.setdefault(section, {})[key] = value
    try:
        config = config_from_dict(sections)
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return config


def raw_of(config: Config, *, block_length: int | None) -> dict[str, Any]:
    """A config.json for a network of ours.

    Raises:
        CheckpointError: transformers has no such network; names the key.
    """
    model = config.model
    if model.positions == "learned":
        kind = "gpt2"
    elif model.qk_norm:
        kind = "qwen3"
    else:
        kind = "qwen2" if model.qkv_bias and not model.attention_out_bias else "llama"
    row = ARCHITECTURES[kind]
    resolved = {
        "model.num_kv_heads": config.trunk.kv_heads,
        "model.head_dim": config.trunk.head_dim,
        "model.ffn_hidden_size": config.trunk.inner,
        "data.block_length": block_length,
    }
    raw: dict[str, Any] = {"model_type": kind, "architectures": [row.class_name]}
    for ours, theirs in row.keys.items():
        raw[theirs] = resolved[ours] if ours in resolved else config.value(ours)
    raw |= {theirs: values[0] for theirs, values in row.computed.items()}
    if kind != "gpt2":
        raw["rope_theta"] = model.rotary_base
        raw["rope_scaling"] = _rope_scaling(config)
        if block_length is None:
            raise CheckpointError("the checkpoint does not name its block length")
    found = config_of(Path("config.json"), raw)
    apart = differences(config, found)
    objectives = config.training.objective, found.training.objective
    if objectives[0] != objectives[1]:
        apart["training.objective"] = objectives
    for key, (has, wanted) in apart.items():
        raise CheckpointError(
            f"{key}={scalar_text(has)} cannot be written as a {row.class_name} of transformers, "
            f"which has {scalar_text(wanted)}"
        )
    return raw


def same_config(text: str, config: Config) -> bool:
    """Whether a config.json that was kept still describes the network."""
    found = config_of(Path("config.json"), json.loads(text))
    same = found.model.vocab_size == config.model.vocab_size
    return same and not differences(config, found)


def _refusal(file: Path, key: str, given: Any, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} says {key}={json.dumps(given)}, a network that cannot be read: {why}"
    )


def _check_parts(file: Path, raw: Mapping[str, Any]) -> None:
    """Refuse what a config.json of any architecture may ask for and no network here has."""
    if raw.get("quantization_config") is not None:
        kind = (raw["quantization_config"] or {}).get("quant_method")
        raise _refusal(
            file, "quantization_config", kind, "give the weights that were not yet quantised"
        )
    if raw.get("model_type") == "mistral":
        window, longest = raw.get("sliding_window", 4096), raw.get("max_position_embeddings", 0)
        if window is not None and window < longest:
            why = f"attention here has no window; set it to null to stay within {window} tokens"
            raise _refusal(file, "sliding_window", window, why)
    for kind in raw.get("layer_types") or []:
        if kind != "full_attention":
            raise _refusal(file, "layer_types", kind, "attention here has no window")


def _value(file: Path, raw: Mapping[str, Any], row: Architecture, key: str) -> Any:
    if key not in raw and key not in row.defaults:
        raise CheckpointError(f"{file} lacks the key {key!r}: fetch the file again")
    return raw.get(key, row.defaults.get(key))


_ROPE_KEYS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
        *("original_max_position_embeddings", "truncate", "finetuned"),
    ),
}
_ROPE_DEFAULTS = {"llama3": (1.0, 4.0), "yarn": (1.0, 32.0)}


def _rotary(file: Path, raw: Mapping[str, Any], longest: Any) -> dict[str, Any]:
    """How positions turn queries and keys, by our keys."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    base = rope.pop("rope_theta", None) or raw.get("rope_theta", 10_000.0)
    partial = rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise _refusal(file, "partial_rotary_factor", partial, "all of a head is turned here")
    if kind not in _ROPE_KEYS:
        why = f"of ways to slow rotary angles down, {' and '.join(_ROPE_DEFAULTS)} are known here"
        raise _refusal(file, "rope_type", kind, why)
    for key, value in rope.items():
        if kind != "default" and key not in _ROPE_KEYS[kind]:
            raise _refusal(file, key, value, f"{kind} has no such key here")
    said: dict[str, Any] = {"model.positions": "rotary", "model.rotary_base": float(base)}
    if kind == "default":
        return said
    original = rope.get("original_max_position_embeddings") or longest
    factor = rope.get("factor") or longest / original
    low, high = _ROPE_DEFAULTS[kind]
    if kind == "llama3":
        low, high = rope.get("low_freq_factor", low), rope.get("high_freq_factor", high)
    else:
        low, high = rope.get("beta_slow") or low, rope.get("beta_fast") or high
        if rope.get("truncate", True) is not True:
            raise _refusal(file, "truncate", False, "the range of yarn is rounded here")
        scale = rope.get("attention_factor")
        if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            mine, all_dims = (
                0.1 * rope[key] * math.log(max(1.0, factor)) + 1.0
                for key in ("mscale", "mscale_all_dim")
            )
            scale = mine / all_dims
        said["model.rotary_attention_factor"] = None if scale is None else float(scale)
    return said | {
        "model.rotary_scaling": kind,
        "model.rotary_factor": float(factor),
        "model.rotary_original_length": int(original),
        "model.rotary_low": float(low),
        "model.rotary_high": None if high == _ROPE_DEFAULTS[kind][1] else float(high),
    }


def _rope_scaling(config: Config) -> dict[str, Any] | None:
    model, kind = config.model, config.model.rotary_scaling
    if kind == "none":
        return None
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else _BETAS
    high = _ROPE_DEFAULTS[kind][1] if model.rotary_high is None else model.rotary_high
    scaling = {
        "rope_type": kind,
        "factor": model.rotary_factor,
        "original_max_position_embeddings": model.rotary_original_length,
        names[0]: model.rotary_low,
        names[1]: high,
    }
    if model.rotary_attention_factor is not None:
        scaling["attention_factor"] = model.rotary_attention_factor
    return scaling


_BETAS = ("beta_slow", "beta_fast")
