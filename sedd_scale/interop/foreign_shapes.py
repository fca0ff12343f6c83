"""The sizes of a model, from the shapes of its tensors under the published names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sedd_scale.arrays import Shape
from sedd_scale.config import Config, config_from_dict
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.foreign_config import NOTHING, Said
from sedd_scale.interop.sedd_names import INV_FREQ

DEFAULT_BLOCK_LENGTH = 1024
DEFAULT_HEAD_DIM = 64

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_MATRICES = {
    "vocab_embed.embedding": "[V, H]",
    "sigma_map.mlp.0.weight": "[C, 256]",
    "blocks.0.mlp.0.weight": "[4 H, H]",
}


def config_of_shapes(path: Path, shapes: Mapping[str, Shape], known: Mapping[str, Said]) -> Config:
    """The configuration of the model whose tensors have these shapes.

    Args:
        shapes: by published name, `INV_FREQ` included where it is there.
        known: what is said, by our keys; it wins over the shapes.

    Raises:
        CheckpointError: a tensor that the sizes are read from is missing, or no such model can be.
    """
    for name, wanted in _MATRICES.items():
        found = shapes.get(name)
        if found is None:
            raise CheckpointError(
                f"{path} is not a SEDD network: missing {name} {wanted}; it holds "
                f"{', '.join(sorted(shapes)[:3]) or 'no tensors'}"
            )
        if len(found) != 2:
            raise CheckpointError(f"{path}: {name} is {list(found)} and should be {wanted}")
    states, width = shapes["vocab_embed.embedding"]
    blocks = [int(match[1]) for match in map(_BLOCK.match, shapes) if match]
    graph = known.get("graph.name", NOTHING).value or "absorb"
    head_dim = 2 * shapes[INV_FREQ][0] if INV_FREQ in shapes else DEFAULT_HEAD_DIM
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": width,
            "num_layers": max(blocks) + 1,
            "num_heads": max(1, width // head_dim),
            "cond_dim": shapes["sigma_map.mlp.0.weight"][0],
            "mlp_ratio": max(1, shapes["blocks.0.mlp.0.weight"][0] // width),
            "vocab_size": states - (graph == "absorb"),
        },
        "graph": {"name": graph},
        "data": {"block_length": DEFAULT_BLOCK_LENGTH},
    }
    for dotted, said in known.items():
        section, _, key = dotted.partition(".")
        if key:
            sections.setdefault(section, {})[key] = said.value
    try:
        config = config_from_dict(sections)
        config.validate()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    is_width = config.model.hidden_size == width  # of another, the tensors are misshapen
    if INV_FREQ in shapes and is_width and config.trunk.head_dim != head_dim:
        raise CheckpointError(
            f"{path}: {INV_FREQ} [{head_dim // 2}] belongs to heads of width {head_dim}, but "
            f"{config.model.num_heads} heads share {width}: give {width // head_dim} heads"
        )
    return config
