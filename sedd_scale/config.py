"""One tree of dataclasses for everything a run depends on.

Each field carries its sentence, its limits and its choices. `load_config` fills the tree from YAML
files and dotted overrides; `Config.validate` refuses what cannot run, before any process group.
"""

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from sedd_scale.config_rules import check_combinations, check_value
from sedd_scale.errors import ConfigError
from sedd_scale.yaml_text import parse_yaml, read_yaml, scalar_text


def _key(default: Any, sentence: str, *, choices: Sequence[Any] = (), **limits: float) -> Any:
    """A dataclass field with its sentence, its choices and its limits.

    Limits are `at_least`, `above` and `below`, as `config_rules.LIMITS` reads them.
    """
    metadata = {"sentence": sentence, "choices": tuple(choices), "limits": limits}
    return field(default=default, metadata=metadata)


def _section(section_class: type, sentence: str) -> Any:
    return field(default_factory=section_class, metadata={"sentence": sentence})


@dataclass(frozen=True)
class ModelConfig:
    hidden_size: int = _key(768, "Width of the residual stream.", at_least=1)
    num_layers: int = _key(12, "Number of transformer blocks.", at_least=1)
    num_heads: int = _key(12, "Attention heads in each block.", at_least=1)
    cond_dim: int = _key(
        128, "Width of the time conditioning that modulates every block.", at_least=1
    )
    mlp_ratio: int = _key(4, "Inner width of the MLP in multiples of hidden_size.", at_least=1)
    dropout: float = _key(
        0.1, "Probability of dropping a number on each residual branch.", at_least=0, below=1
    )
    scale_by_sigma: bool | None = _key(
        None,
        "Divide the score by expm1(sigma) times N; null: true for absorb, false for uniform.",
    )
    vocab_size: int | None = _key(
        None, "Number of real tokens N, without the mask; null: the dataset's.", at_least=2
    )
    attention: str = _key(
        "auto",
        "Attention backend; auto: flash where it is installed and can run, else sdpa.",
        choices=("auto", "sdpa", "flash"),
    )
    document_attention: bool = _key(
        False, "Attend only to positions of the same document of a packed block."
    )
    residual_dtype: str = _key(
        "fp32", "Number format of the residual stream.", choices=("fp32", "bf16")
    )
    zero_init: bool = _key(True, "Start the head and all modulations at zero, as the paper does.")


@dataclass(frozen=True)
class GraphConfig:
    name: str = _key(
        "absorb",
        "Forward corruption; absorb: tokens become the mask, uniform: tokens are redrawn.",
        choices=("absorb", "uniform"),
    )


@dataclass(frozen=True)
class NoiseConfig:
    name: str = _key(
        "loglinear",
        "Noise schedule, the curve of total noise sigma over time t in [0, 1].",
        choices=("loglinear", "geometric", "cosine", "linear"),
    )
    eps: float = _key(
        1e-3,
        "Distance of the move probability at t = 1 from one (not geometric).",
        above=0,
        below=1,
    )
    sigma_min: float = _key(1e-4, "Total noise at t = 0 of the geometric schedule.", above=0)
    sigma_max: float = _key(20.0, "Total noise at t = 1 of the geometric schedule.", above=0)
    t_min: float = _key(1e-3, "Smallest time drawn in training.", above=0, below=1)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = _key(
        None,
        "Dataset of tools/prepare_data.py: a directory, a URL, or pipe: and a command.",
    )
    mixture: list | None = _key(
        None,
        "Instead of path, a list of {path, weight} or {path, tokens}; tokens: of the whole run.",
    )
    stages: list | None = _key(
        None, "A list of {step, weights}: from this step on, these weights of the mixture."
    )
    block_length: int | None = _key(
        None, "Tokens in a training sequence; null: the dataset's.", at_least=1
    )
    shuffle_window: int | None = _key(
        262_144, "Blocks shuffled together, in whole shards; null: all.", at_least=1
    )
    random_length: float = _key(
        0.0,
        "Share of blocks cut to a random length; what is cut off becomes padding.",
        at_least=0,
        at_most=1,
    )
    on_bad_shard: str = _key(
        "stop",
        "At a damaged shard; skip: replace its blocks by others, alike on all ranks.",
        choices=("stop", "skip"),
    )
    cache_dir: str | None = _key(
        None, "Where a node keeps files of remote data; null: in the temporary directory."
    )
    cache_gb: float = _key(20.0, "Size of that cache in gigabytes.", above=0)


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = _key(1, "Processes that share the tensors of one layer.", at_least=1)
    pipeline: int = _key(1, "Stages that the list of layers is cut into.", at_least=1)
    zero_stage: int = _key(
        1,
        "ZeRO stage; 1 spreads optimizer state over data-parallel ranks, 2 gradients, 3 weights.",
        choices=(1, 2, 3),
    )
    sequence_parallel: bool = _key(
        False, "Spread activations between tensor-parallel layers over the sequence."
    )
    recompute_every: int = _key(
        0, "Recompute activations of every k-th block in the backward pass; 0: none.", at_least=0
    )
    recompute_mode: str = _key(
        "full",
        "What such a block recomputes; full: all; selective: all but matrix products, attention.",
        choices=("full", "selective"),
    )


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = _key(3e-4, "Peak learning rate of AdamW.", above=0)
    beta1: float = _key(0.9, "Decay of AdamW's mean of gradients.", at_least=0, below=1)
    beta2: float = _key(0.999, "Decay of AdamW's mean of squared gradients.", at_least=0, below=1)
    eps: float = _key(1e-8, "Added to the root of AdamW's mean of squared gradients.", above=0)
    weight_decay: float = _key(0.0, "Decoupled weight decay of AdamW.", at_least=0)
    clip: float = _key(1.0, "Largest gradient norm; longer gradients are scaled to it.", above=0)
    schedule: str = _key(
        "constant",
        "Learning rate after warm-up; wsd: constant, then a linear decay at the end.",
        choices=("constant", "cosine", "wsd"),
    )
    warmup_steps: int = _key(2500, "Steps of linear warm-up from zero to lr.", at_least=0)
    decay_steps: int = _key(0, "Steps of the final decay, for schedule wsd alone.", at_least=0)
    min_lr_ratio: float = _key(
        0.0, "Last learning rate over lr, for cosine and wsd.", at_least=0, below=1
    )
    ema_decay: float = _key(
        0.9999, "Decay of the moving average of the weights, once warmed up.", at_least=0, below=1
    )


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = _key(400_000, "Optimizer steps of the whole run.", at_least=1)
    global_batch: int = _key(512, "Sequences in one optimizer step, over all ranks.", at_least=1)
    micro_batch: int = _key(8, "Sequences in one forward pass of one rank.", at_least=1)
    seed: int = _key(0, "Seed of weights, data order, noise and dropout.", at_least=0, below=2**63)
    precision: str = _key(
        "bf16",
        "Number format of weights and activations; losses and master weights stay fp32.",
        choices=("fp32", "bf16"),
    )
    resume: str = _key(
        "auto",
        "auto: go on from the run directory's last checkpoint; never; or a checkpoint's path.",
    )
    valid_every: int = _key(
        1000, "Steps between validations of the averaged weights; 0: never.", at_least=0
    )
    valid_blocks: int = _key(256, "Validation sequences in one validation.", at_least=1)


@dataclass(frozen=True)
class LoggingConfig:
    every: int = _key(10, "Steps between lines of metrics.", at_least=1)
    wandb: str = _key("off", "Also log to Weights & Biases.", choices=("off", "online", "offline"))
    wandb_project: str = _key("sedd-scale", "Weights & Biases project.")
    wandb_name: str | None = _key(
        None, "Weights & Biases run name; null: the name of the run directory."
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = _key(1000, "Steps between checkpoints; the last step always has one.", at_least=1)
    keep: int = _key(3, "Latest checkpoints kept in the run directory; 0: all.", at_least=0)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; immutable, so that all readers agree."""

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

    @property
    def resolved_scale_by_sigma(self) -> bool:
        """`model.scale_by_sigma`, with null resolved by the graph."""
        if self.model.scale_by_sigma is None:
            return self.graph.name == "absorb"
        return self.model.scale_by_sigma

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model.hidden_size // self.model.num_heads

    def data_parallel(self, world_size: int) -> int:
        """Number of model replicas among `world_size` processes; ConfigError if none fits."""
        tensor, pipeline = self.parallel.tensor, self.parallel.pipeline
        if world_size < 1 or world_size % (tensor * pipeline):
            raise ConfigError(
                f"{world_size} processes cannot be shared by parallel.tensor={tensor} x "
                f"parallel.pipeline={pipeline}: start a multiple of {tensor * pipeline} processes "
                "or change these keys"
            )
        return world_size // (tensor * pipeline)

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

    def require_data(self) -> str:
        """`data.path`, for work that needs a dataset; ConfigError where it is null."""
        if self.data.path is None:
            raise ConfigError(
                "data.path is null: prepare a dataset with tools/prepare_data.py and give its "
                "directory as data.path=DIR"
            )
        return self.data.path

    def override(self, *assignments: str) -> "Config":
        """A copy with `section.key=value` assignments applied; ConfigError as in `load_config`."""
        values = dict(_flatten(self.to_dict(), "config"))
        values.update(_parse_override(assignment) for assignment in assignments)
        return _build(values)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, of plain types only."""
        return {
            section.name: {
                key.name: getattr(getattr(self, section.name), key.name)
                for key in fields(section_type)
            }
            for section, section_type in _sections()
        }

    def to_yaml(self) -> str:
        """The whole tree as YAML with every sentence as a comment; it loads back equal."""
        lines: list[str] = []
        for section, section_type in _sections():
            lines += [f"# {section.metadata['sentence']}", f"{section.name}:"]
            for key in fields(section_type):
                value = getattr(getattr(self, section.name), key.name)
                lines.append(f"  # {key.metadata['sentence']}")
                lines.append(f"  {key.name}: {scalar_text(value)}")
        return "\n".join(lines) + "\n"

    def validate(self, world_size: int | None = None) -> None:
        """Refuse what cannot run, by name, before any process group starts.

        A run that takes `data.block_length` or `model.vocab_size` from its dataset fills them in
        with `override` and validates again.

        Args:
            world_size: number of processes; None leaves out what depends on it.

        Raises:
            ConfigError: names the keys, their values and the fix.
        """
        for section, section_type in _sections():
            for key in fields(section_type):
                value = getattr(getattr(self, section.name), key.name)
                check_value(f"{section.name}.{key.name}", key.metadata, value)
        check_combinations(self)
        if world_size is not None:
            self.accumulation(world_size)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, the files its `base:` names, and dotted overrides.

    Bases (a path or a list, relative to the file) come first, later over earlier; the file comes
    over its bases, and overrides such as `parallel.tensor=2` over everything.

    Raises:
        ConfigError: a file is missing, empty or no YAML; bases form a circle; a key is unknown; a
            value has the wrong type. Limits and combinations are `Config.validate`'s work.
    """
    return _build(_load_file(Path(path), ())).override(*overrides)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The inverse of `Config.to_dict`; keys left out take their defaults; raises ConfigError."""
    return _build(dict(_flatten(tree, "config")))


def _sections() -> Iterator[tuple[Field[Any], type[Any]]]:
    for section in fields(Config):
        yield section, cast(type[Any], section.type)


def _keys() -> dict[str, Field[Any]]:
    return {
        f"{section.name}.{key.name}": key
        for section, section_type in _sections()
        for key in fields(section_type)
    }


def _build(values: Mapping[str, Any]) -> Config:
    """The tree from dotted keys and values whose names and types are checked already."""
    sections = {
        section.name: section_type(
            **{
                key.name: values[f"{section.name}.{key.name}"]
                for key in fields(section_type)
                if f"{section.name}.{key.name}" in values
            }
        )
        for section, section_type in _sections()
    }
    return Config(**sections)


def _load_file(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in chain:
        circle = " -> ".join(str(link) for link in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: base: goes round in a circle ({circle}): remove one of them")
    tree = read_yaml(path)
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base={bases!r} is neither a path nor a list of paths")
    values: dict[str, Any] = {}
    for base in bases:
        values.update(_load_file(path.parent / base, (*chain, resolved)))
    values.update(_flatten(tree, str(path)))
    return values


def _flatten(tree: Mapping[str, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and typed values of nested mappings; raises ConfigError naming `source`."""
    keys = _keys()
    names = [section.name for section, _ in _sections()]
    for name, section in tree.items():
        if name not in names:
            guess = _nearest_key(str(name), names)
            raise ConfigError(f"{source}: unknown section {name}; did you mean {guess}?")
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise ConfigError(f"{source}: {name}={section!r} is not a section of keys and values")
        for key, value in section.items():
            dotted = f"{name}.{key}"
            if dotted not in keys:
                guess = _nearest_key(dotted, keys)
                raise ConfigError(f"{source}: unknown key {dotted}; did you mean {guess}?")
            yield dotted, _typed(dotted, keys[dotted], value, source)


def _parse_override(assignment: str) -> tuple[str, Any]:
    dotted, equals, text = assignment.partition("=")
    keys = _keys()
    if not equals:
        raise ConfigError(f"override {assignment!r} is not of the form section.key=value")
    if dotted not in keys:
        guess = _nearest_key(dotted, keys)
        raise ConfigError(f"override {assignment!r}: unknown key {dotted}; did you mean {guess}?")
    expected, may_be_null = _expected_type(keys[dotted])
    source = f"override {assignment!r}"
    # A path or a name is taken letter by letter: it may look like a number or hold a colon.
    if expected is str and not (may_be_null and text == "null"):
        return dotted, text
    return dotted, _typed(dotted, keys[dotted], parse_yaml(text, source), source)


def _nearest_key(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The known name closest to `name`: one with the same last part first, then by spelling."""
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in _keys() if key.rpartition(".")[2] == leaf]
    return get_close_matches(name, same_leaf or list(known), n=1, cutoff=0.0)[0]


def _expected_type(key: Field[Any]) -> tuple[type[Any], bool]:
    """The type of a key's values and whether null is one of them."""
    if isinstance(key.type, types.UnionType):
        (expected,) = (part for part in typing.get_args(key.type) if part is not types.NoneType)
        return expected, True
    return cast(type[Any], key.type), False


_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
}


def _typed(dotted: str, key: Field[Any], value: Any, source: str) -> Any:
    expected, may_be_null = _expected_type(key)
    if value is None and may_be_null:
        return None
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected or (expected is float and not math.isfinite(value)):
        wanted = _TYPE_NAMES[expected] + (" or null" if may_be_null else "")
        raise ConfigError(f"{source}: {dotted}={scalar_text(value)} is not {wanted}")
    return value
