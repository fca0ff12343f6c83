"""The tree of sections, and what follows from its values by arithmetic alone."""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, cast

from sedd_scale.config.sections import (
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
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.errors import ConfigError


def _section(section_class: type, sentence: str) -> Any:
    return field(default_factory=section_class, metadata={"sentence": sentence})


@dataclass(frozen=True)
class ConfigTree:
    """The sections of a configuration; immutable, so that all readers agree."""

    model: ModelConfig = _section(ModelConfig, "The network.")
    graph: GraphConfig = _section(GraphConfig, "How tokens are corrupted.")
    noise: NoiseConfig = _section(NoiseConfig, "How much tokens are corrupted, and when.")
    data: DataConfig = _section(DataConfig, "What to train on.")
    parallel: ParallelConfig = _section(
        ParallelConfig, "How processes share the work; data parallelism is what is left of them."
    )
    optimizer: OptimizerConfig = _section(OptimizerConfig, "How weights follow the gradient.")
    training: TrainingConfig = _section(TrainingConfig, "How long, with what batch, from where.")
    logging: LoggingConfig = _section(LoggingConfig, "What is reported, and where to.")
    checkpoint: CheckpointConfig = _section(CheckpointConfig, "What is saved.")

    def all_keys(self) -> Iterator[tuple[str, "Field[Any]", Any]]:
        """Every key by its whole name, with its field and its value."""
        for section in fields(self):
            tree = getattr(self, section.name)
            for one in fields(tree):
                yield f"{section.name}.{one.name}", one, getattr(tree, one.name)

    def value(self, key: str) -> Any:
        """The value of a key by its whole name."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    @property
    def resolved_scale_by_sigma(self) -> bool:
        """`model.scale_by_sigma`, with null resolved by the graph."""
        if self.model.scale_by_sigma is None:
            return self.graph.facts.scales_by_sigma
        return self.model.scale_by_sigma

    @property
    def trunk(self) -> TrunkShape:
        """The shape of the blocks."""
        return TrunkShape.of(self.model)

    def data_parallel(self, world_size: int) -> int:
        """Number of model replicas among `world_size` processes; ConfigError if none fits."""
        return self.parallel.replicas(world_size)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches one rank runs in one step; ConfigError if the batch does not divide."""
        data_parallel = self.data_parallel(world_size)
        global_batch, micro_batch = self.training.global_batch, self.training.micro_batch
        unit = micro_batch * data_parallel
        if global_batch % unit:
            nearest = max(1, round(global_batch / unit)) * unit
            raise ConfigError(
                f"training.global_batch={global_batch} is not a multiple of "
                f"training.micro_batch={micro_batch} x {data_parallel} data-parallel ranks: "
                f"set training.global_batch={nearest} or change training.micro_batch"
            )
        return global_batch // unit

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, of plain types only."""
        return {
            section.name: {
                key.name: getattr(getattr(self, section.name), key.name)
                for key in fields(section_type)
            }
            for section, section_type in sections()
        }

    def to_yaml(self) -> str:
        """The whole tree as YAML with every sentence as a comment; it loads back equal."""
        lines: list[str] = []
        for section, section_type in sections():
            lines += [f"# {section.metadata['sentence']}", f"{section.name}:"]
            for key in fields(section_type):
                value = getattr(getattr(self, section.name), key.name)
                lines.append(f"  # {key.metadata['sentence']}")
                lines.append(f"  {key.name}: {scalar_text(value)}")
        return "\n".join(lines) + "\n"


def sections() -> Iterator[tuple[Field[Any], type[Any]]]:
    """Each section's field in the tree, with the dataclass of its keys."""
    for section in fields(ConfigTree):
        yield section, cast(type[Any], section.type)


def config_keys() -> Iterator[tuple[str, Field[Any]]]:
    """Every key as section.key, with the field that describes it."""
    for section, section_type in sections():
        for key in fields(section_type):
            yield f"{section.name}.{key.name}", key
