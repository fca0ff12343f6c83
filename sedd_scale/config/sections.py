"""The sections of a run's configuration: each key with its sentence, its limits and its choices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from sedd_scale.config.graph_facts import GRAPHS, GraphFacts
from sedd_scale.errors import ConfigError

NETWORK, TASK, ORDER, FREE = "network", "task", "order", "free"
"""What a key belongs to: the network, which whoever reads its weights must have alike; what it is
trained for or the order of its data, which a resume must have alike; or nothing of these."""


def _key(
    default: Any,
    sentence: str,
    *,
    choices: Sequence[Any] = (),
    shared: str = FREE,
    only_with: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    axis: str = "",
    **limits: float,
) -> Any:
    """A dataclass field with its sentence and the facts of its key.

    Args:
        choices: the values there are; none: all of its type.
        shared: what it belongs to, as `NETWORK` and the others say.
        only_with: other keys with the values that they must have for this one to have an effect.
        axis: short name of the axis of processes whose size it is, that share one model.
        limits: `at_least`, `at_most`, `above` and `below`, as `config.rules.LIMITS` reads them.
    """
    metadata = {
        "sentence": sentence,
        "choices": tuple(choices),
        "shared": shared,
        "only_with": only_with,
        "axis": axis,
        "limits": limits,
    }
    return field(default=default, metadata=metadata)


_MUON = {"optimizer.name": ("muon",)}
_ROTARY = {"model.positions": ("rotary",)}
_SCALED = {"model.rotary_scaling": ("llama3", "yarn")}


@dataclass(frozen=True)
class ModelConfig:
    hidden_size: int = _key(768, "Width of the residual stream.", at_least=1, shared=NETWORK)
    num_layers: int = _key(12, "Number of transformer blocks.", at_least=1, shared=NETWORK)
    num_heads: int = _key(12, "Attention heads in each block.", at_least=1, shared=NETWORK)
    num_kv_heads: int | None = _key(
        None,
        "Heads of keys and values, each shared by as many query heads; null: num_heads.",
        at_least=1,
        shared=NETWORK,
    )
    head_dim: int | None = _key(
        None, "Width of one head; null: hidden_size / num_heads.", at_least=1, shared=NETWORK
    )
    norm: str = _key(
        "layernorm",
        "Norm before attention, before the MLP and before the head.",
        choices=("layernorm", "rmsnorm"),
        shared=NETWORK,
    )
    norm_bias: bool = _key(False, "Give every norm a bias beside its weight.", shared=NETWORK)
    norm_epsilon: float = _key(
        1e-5, "Added to the mean square that a norm divides by.", above=0, shared=NETWORK
    )
    qk_norm: bool = _key(
        False, "Norm queries and keys over each head, with one weight for all.", shared=NETWORK
    )
    activation: str = _key(
        "gelu",
        "Activation of the MLP; gelu: its tanh form; swiglu, geglu: times a second product.",
        choices=("gelu", "swiglu", "geglu"),
        shared=NETWORK,
    )
    ffn_hidden_size: int | None = _key(
        None,
        "Inner width of the MLP; null: mlp_ratio times hidden_size.",
        at_least=1,
        shared=NETWORK,
    )
    qkv_bias: bool = _key(False, "Give queries, keys and values a bias.", shared=NETWORK)
    attention_out_bias: bool = _key(False, "Give attention's output a bias.", shared=NETWORK)
    mlp_bias: bool = _key(True, "Give the MLP's matrices biases.", shared=NETWORK)
    head_bias: bool = _key(True, "Give the map to logits a bias.", shared=NETWORK)
    tied_embedding: bool = _key(
        False, "Let the map to logits have the token embedding's weights.", shared=NETWORK
    )
    conditioning: str = _key(
        "adaln",
        "How sigma conditions the network; none: not at all, without the weights for it.",
        choices=("adaln", "none"),
        shared=NETWORK,
    )
    adaln_gate_init: str = _key(
        "zero",
        "Gates of the branches at the start; one: those of a network without conditioning.",
        choices=("zero", "one"),
        only_with={"model.conditioning": ("adaln",)},
    )
    cond_dim: int = _key(
        128,
        "Width of the time conditioning that modulates every block.",
        at_least=1,
        shared=NETWORK,
    )
    time_conditioning: bool = _key(
        True,
        "Condition on sigma; false needs scaled absorb, or parametrisation=mean.",
        shared=NETWORK,
    )
    mlp_ratio: int = _key(
        4,
        "Inner width of the MLP in multiples of hidden_size, where ffn_hidden_size is null.",
        at_least=1,
        shared=NETWORK,
    )
    dropout: float = _key(
        0.1, "Probability of dropping a number on each residual branch.", at_least=0, below=1
    )
    scale_by_sigma: bool | None = _key(
        None,
        "Divide the score by expm1(sigma) times N; null: true for absorb, false for uniform.",
        shared=NETWORK,
    )
    parametrisation: str = _key(
        "score",
        "What outputs are; mean: logits of the clean token's law, from which scores follow.",
        choices=("score", "mean"),
        shared=NETWORK,
        only_with={"training.objective": ("score_entropy",)},
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
        False, "Attend only to positions of the same document of a packed block.", shared=TASK
    )
    positions: str = _key(
        "rotary",
        "How positions are known; learned: a vector for each, added to the token's.",
        choices=("rotary", "learned", "none"),
        shared=NETWORK,
    )
    max_positions: int | None = _key(
        None,
        "Vectors of positions=learned: the longest sequence there can be.",
        at_least=1,
        shared=NETWORK,
        only_with={"model.positions": ("learned",)},
    )
    rotary_base: float = _key(
        10_000.0,
        "Base of the rotary angles; smaller tells near positions apart better; 0: no positions.",
        at_least=0,
        shared=NETWORK,
        only_with=_ROTARY,
    )
    rotary_scaling: str = _key(
        "none",
        "How rotary angles are slowed down for sequences longer than those first trained on.",
        choices=("none", "llama3", "yarn"),
        shared=NETWORK,
        only_with=_ROTARY,
    )
    rotary_factor: float = _key(
        1.0, "By how much, at most.", at_least=1, shared=NETWORK, only_with=_SCALED
    )
    rotary_original_length: int | None = _key(
        None, "The length first trained on.", at_least=1, shared=NETWORK, only_with=_SCALED
    )
    rotary_low: float = _key(
        1.0,
        "Angles that turn fewer times over that length are slowed down by all of the factor.",
        above=0,
        shared=NETWORK,
        only_with=_SCALED,
    )
    rotary_high: float | None = _key(
        None,
        "Those that turn more often are left alone; null: 4 of llama3, 32 of yarn.",
        above=0,
        shared=NETWORK,
        only_with=_SCALED,
    )
    rotary_attention_factor: float | None = _key(
        None,
        "What yarn multiplies queries and keys by; null: 0.1 ln(rotary_factor) + 1.",
        above=0,
        shared=NETWORK,
        only_with={"model.rotary_scaling": ("yarn",)},
    )
    residual_dtype: str = _key(
        "fp32", "Number format of the residual stream.", choices=("fp32", "bf16")
    )
    zero_init: bool = _key(True, "Start the head and all modulations at zero, as the paper does.")
    init_from: str | None = _key(
        None, "Checkpoint of any readable format whose averaged weights a new run starts from."
    )
    init_options: str | None = _key(
        None,
        "What init_from's files do not say, by the options of eval_ppl: mask_id=4,graph=absorb.",
    )
    grow_vocab: bool = _key(
        False, "Let a dataset with more tokens than init_from append them to its vocabulary."
    )
    calibrate_head: bool = _key(
        False,
        "Fold the free offset of init_from's autoregressive logits into the head's bias.",
        only_with={
            "training.objective": ("score_entropy",),
            "graph.name": ("absorb",),
            "model.parametrisation": ("score",),
            "model.head_bias": (True,),
        },
    )

    @property
    def cond_width(self) -> int:
        """Width of the conditioning vector; 0: there is none."""
        return self.cond_dim if self.conditioning == "adaln" else 0


@dataclass(frozen=True)
class GraphConfig:
    name: str = _key(
        "absorb",
        "Forward corruption; absorb: tokens become the mask, uniform: tokens are redrawn.",
        choices=tuple(GRAPHS),
        shared=NETWORK,
    )

    @property
    def facts(self) -> GraphFacts:
        """What is known of the graph by its name."""
        return GRAPHS[self.name]


@dataclass(frozen=True)
class NoiseConfig:
    name: str = _key(
        "loglinear",
        "Noise schedule, the curve of total noise sigma over time t in [0, 1].",
        choices=("loglinear", "geometric", "cosine", "linear"),
        shared=TASK,
    )
    eps: float = _key(
        1e-3,
        "Distance of the move probability at t = 1 from one (not geometric).",
        above=0,
        below=1,
        shared=TASK,
    )
    sigma_min: float = _key(
        1e-4, "Total noise at t = 0 of the geometric schedule.", above=0, shared=TASK
    )
    sigma_max: float = _key(
        20.0, "Total noise at t = 1 of the geometric schedule.", above=0, shared=TASK
    )
    t_min: float = _key(1e-3, "Smallest time drawn in training.", above=0, below=1, shared=TASK)


@dataclass(frozen=True)
class DataConfig:
    path: str | None = _key(
        None,
        "Dataset of sedd-scale prepare_data: a directory, a URL, or pipe: and a command.",
    )
    mixture: list[Any] | None = _key(
        None,
        "Instead of path, a list of {path, weight} or {path, tokens}; tokens: of the whole run.",
    )
    stages: list[Any] | None = _key(
        None, "A list of {step, weights}: from this step on, these weights of the mixture."
    )
    block_length: int | None = _key(
        None, "Tokens in a training sequence; null: the dataset's.", at_least=1
    )
    shuffle_window: int | None = _key(
        262_144, "Blocks shuffled together, in whole shards; null: all.", at_least=1, shared=ORDER
    )
    random_length: float = _key(
        0.0,
        "Share of blocks cut to a random length; what is cut off becomes padding.",
        at_least=0,
        at_most=1,
        shared=ORDER,
    )
    on_bad_shard: str = _key(
        "stop",
        "At a damaged shard; skip: replace its blocks by others, the same on all ranks.",
        choices=("stop", "skip"),
    )
    cache_dir: str | None = _key(
        None, "Where a node keeps files of remote data; null: in the temporary directory."
    )
    cache_gb: float = _key(20.0, "Size of that cache in gigabytes.", above=0)


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = _key(1, "Processes that share the tensors of one layer.", at_least=1, axis="TP")
    pipeline: int = _key(1, "Stages that the list of layers is cut into.", at_least=1, axis="PP")
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

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the axes of processes that share one model, by name."""
        return {name: getattr(self, name) for name in MODEL_AXES}

    @property
    def model_size(self) -> int:
        """Processes that share one model; the others are data-parallel."""
        return math.prod(self.axes.values())

    def replicas(self, processes: int) -> int:
        """Data-parallel size; ConfigError for processes that do not fit the axes."""
        if processes < 1 or processes % self.model_size:
            product = " x ".join(f"parallel.{name}={size}" for name, size in self.axes.items())
            raise ConfigError(
                f"{processes} processes cannot be shared by {product}: start a multiple of "
                f"{self.model_size} processes or change these keys"
            )
        return processes // self.model_size

    def text(self, data: int) -> str:
        """Such as "TP2 SP PP1 DP4 ZeRO 1"."""
        axes = [f"{MODEL_AXES[name]}{size}" for name, size in self.axes.items()]
        if self.sequence_parallel:
            axes.insert(1, "SP")
        return f"{' '.join(axes)} DP{data} ZeRO {self.zero_stage}"


MODEL_AXES = {key.name: axis for key in fields(ParallelConfig) if (axis := key.metadata["axis"])}
"""Names of the axes of processes that share one model, and what they are called in short."""


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = _key(
        "adamw",
        "How weights are updated; muon: the trunk's matrices by Muon, all else by AdamW.",
        choices=("adamw", "muon"),
        shared=TASK,
    )
    muon_lr_ratio: float = _key(
        1.0,
        "Learning rate of Muon's matrices over lr; at 1 their steps are as long as AdamW's.",
        above=0,
        only_with=_MUON,
    )
    muon_momentum: float = _key(
        0.95, "Decay of Muon's mean of gradients.", above=0, below=1, only_with=_MUON
    )
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
    decay_steps: int = _key(
        0,
        "Steps of the final decay, for schedule wsd alone.",
        at_least=0,
        only_with={"optimizer.schedule": ("wsd",)},
    )
    min_lr_ratio: float = _key(
        0.0,
        "Last learning rate over lr, for cosine and wsd.",
        at_least=0,
        below=1,
        only_with={"optimizer.schedule": ("cosine", "wsd")},
    )
    ema_decay: float = _key(
        0.9999, "Decay of the moving average of the weights, once warmed up.", at_least=0, below=1
    )


@dataclass(frozen=True)
class TrainingConfig:
    objective: str = _key(
        "score_entropy",
        "What is learned; the others are baselines of the same network: absorb only.",
        choices=("score_entropy", "masked_cross_entropy", "d3pm_absorb", "autoregressive"),
        shared=TASK,
    )
    d3pm_steps: int = _key(
        1000,
        "Steps of the chain, for objective d3pm_absorb alone.",
        at_least=2,
        only_with={"training.objective": ("d3pm_absorb",)},
    )
    d3pm_ce_weight: float = _key(
        0.01,
        "Weight of plain cross-entropy, for objective d3pm_absorb alone.",
        at_least=0,
        only_with={"training.objective": ("d3pm_absorb",)},
    )
    weight_softening: float = _key(
        0.0,
        "Train with weights m' / (m + this) of the move probability m; 0: m' / m, the bound's.",
        at_least=0,
        only_with={"training.objective": ("score_entropy", "masked_cross_entropy")},
    )
    shift: bool = _key(
        False,
        "Outputs at a position are for the next token, as of autoregressive checkpoints.",
        shared=NETWORK,
    )
    anneal_steps: int = _key(
        0,
        "Steps over which attention goes from causal to both sides; 0: both from the start.",
        at_least=0,
        shared=TASK,
        only_with={"training.objective": ("score_entropy", "masked_cross_entropy", "d3pm_absorb")},
    )
    steps: int = _key(400_000, "Optimizer steps of the whole run.", at_least=1, below=2**31)
    global_batch: int = _key(
        512, "Sequences in one optimizer step, over all ranks.", at_least=1, shared=ORDER
    )
    micro_batch: int = _key(8, "Sequences in one forward pass of one rank.", at_least=1)
    seed: int = _key(
        0, "Seed of weights, data order, noise and dropout.", at_least=0, below=2**63, shared=ORDER
    )
    precision: str = _key(
        "bf16",
        "Number format of weights and activations; losses and master weights stay fp32.",
        choices=("fp32", "bf16"),
    )
    resume: str = _key(
        "auto",
        "auto: resume from the run directory's last checkpoint; never; or a checkpoint's path.",
    )
    valid_every: int = _key(
        1000, "Steps between validations of the averaged weights; 0: never.", at_least=0
    )
    valid_blocks: int = _key(256, "Validation sequences in one validation.", at_least=1)
    on_nonfinite: str = _key(
        "stop",
        "At a loss or gradient norm that is not finite; skip: continue without that update.",
        choices=("stop", "skip"),
    )
    skip_steps: list[Any] | None = _key(
        None, "Steps whose updates are left out: numbers and [first, last] ranges, from 1."
    )
    spike_window: int = _key(
        128, "Steps that the z-scores of loss and gradient norm are taken over.", at_least=8
    )
    report_spikes_above: float = _key(
        6.0, "Report steps whose loss or gradient norm has a greater z-score.", above=0
    )
    skip_spikes_above: float | None = _key(
        None, "Leave out the updates of steps with a greater z-score; null: of none.", above=0
    )
    stop_after_skips: int = _key(
        10, "Stop when guards have skipped this many updates in a row.", at_least=1
    )
    check_replicas_every: int = _key(
        1000,
        "Steps between checks that ranks with the same weights hold the same bits; 0: never.",
        at_least=0,
    )
    hang_factor: float = _key(
        20.0,
        "A step longer than this many times the median of recent ones is a hang; 0: no watchdog.",
        at_least=0,
    )
    hang_floor: float = _key(120.0, "Seconds that any step may take.", above=0)
    hang_slow: float = _key(
        1800.0, "Seconds that the first step, a validation or a save may take.", above=0
    )


@dataclass(frozen=True)
class LoggingConfig:
    every: int = _key(10, "Steps between lines of metrics.", at_least=1)
    console: str = _key(
        "auto",
        "auto: a live display on a terminal, plain lines elsewhere; lines: always plain lines.",
        choices=("auto", "lines"),
    )
    wandb: str = _key("off", "Also log to Weights & Biases.", choices=("off", "online", "offline"))
    wandb_project: str = _key("sedd-scale", "Weights & Biases project.")
    wandb_name: str | None = _key(
        None, "Weights & Biases run name; null: the name of the run directory."
    )
    tensorboard: bool = _key(
        False, "Also write event files for TensorBoard, into the run directory's tensorboard/."
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = _key(1000, "Steps between checkpoints; the last step always has one.", at_least=1)
    keep: int = _key(3, "Latest checkpoints kept in the run directory; 0: all.", at_least=0)
    keep_every: int = _key(
        0, "Checkpoints at multiples of this step are kept for good; 0: none is.", at_least=0
    )
    verify: bool = _key(True, "Check the hash of every file of a checkpoint before loading it.")
    async_save: bool = _key(
        True, "Write in the background, from a copy in host memory, while training continues."
    )
    on_failure: str = _key(
        "stop",
        "After a save that failed; continue: keep the last good checkpoint and try again later.",
        choices=("stop", "continue"),
    )
