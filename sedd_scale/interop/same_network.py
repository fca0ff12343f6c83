"""Whether two configurations are of one network, however each of them writes it down."""

from typing import Any

from sedd_scale.config import Config
from sedd_scale.config.sections import NETWORK

_INNER = ("model.ffn_hidden_size", "model.mlp_ratio")


def differences(config: Config, found: Config) -> dict[str, tuple[Any, Any]]:
    """Keys of the network whose values differ, with both values; vocabularies may differ.

    A null is what it stands for, and widths of a conditioning that neither has are left out.
    """
    apart = {}
    for key, field, _ in config.all_keys():
        values = _resolved(config, key), _resolved(found, key)
        if field.metadata["shared"] == NETWORK and values[0] != values[1] and key not in _INNER:
            apart[key] = values
    if config.trunk.inner != found.trunk.inner:
        widths = config.model.ffn_hidden_size, found.model.ffn_hidden_size
        if widths == (None, None):
            apart["model.mlp_ratio"] = config.model.mlp_ratio, found.model.mlp_ratio
        else:
            apart["model.ffn_hidden_size"] = config.trunk.inner, found.trunk.inner
    if config.model.conditioning == found.model.conditioning == "none":
        apart.pop("model.cond_dim", None)
    return apart


def _resolved(config: Config, key: str) -> Any:
    """A key's value, or what its null stands for."""
    return {
        "model.scale_by_sigma": config.resolved_scale_by_sigma,
        "model.num_kv_heads": config.trunk.kv_heads,
        "model.head_dim": config.trunk.head_dim,
    }.get(key, config.value(key))
