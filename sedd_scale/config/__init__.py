"""What a run depends on: a tree of dataclasses, its YAML, and the rules of what goes together."""

from sedd_scale.config.config import Config, config_from_dict, load_config
from sedd_scale.config.sections import (
    MODEL_AXES,
    CheckpointConfig,
    DataConfig,
    GraphConfig,
    LoggingConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from sedd_scale.config.trunk import TrunkShape

__all__ = [
    "MODEL_AXES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GraphConfig",
    "LoggingConfig",
    "ModelConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainingConfig",
    "TrunkShape",
    "config_from_dict",
    "load_config",
]
