"""A small model of parallel layers in an engine of any layout, to be saved and loaded.

Its pieces stand on their own, so that what a checkpoint does is not tested through the network of
the package alone.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import parallel_state
from megatron.core import tensor_parallel as tensor_layers
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_scale.checkpoint.reading import load_checkpoint
from sedd_scale.checkpoint.writer import CheckpointWriter
from sedd_scale.config.sections import CheckpointConfig
from sedd_scale.engine.fragments import ZeroFragments
from sedd_scale.engine.zero import zero_of
from sedd_scale.model.parameters import holds_parts, initialize_parameters, logical_parameters
from sedd_scale.parallel.layout import ModelParallelUnit, initialize_layout
from sedd_scale.planning.model_states import STATE_KEYS
from sedd_scale.training.adamw import AdamWithEMA

deepspeed.utils.logger.setLevel(logging.ERROR)
# Else DeepSpeed compiles a shared-memory extension on its first use on a CPU.
deepspeed.ops.__compatible_ops__ = {}

VOCAB, WIDTH, BATCH, LENGTH = 101, 24, 8, 6


@dataclasses.dataclass(frozen=True)
class Spec:
    """A layout and precision to train the small model in."""

    tensor: int = 1
    pipeline: int = 1
    stage: int = 1
    bf16: bool = False
    seed: int = 0
    vocab: int = VOCAB


def transformer_config(tensor: int) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        tensor_model_parallel_size=tensor,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
    )


class Embed(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.logical_name = "embedding"
        self.vocab_rows = {"tokens.weight": spec.vocab}
        self.tokens = tensor_layers.VocabParallelEmbedding(
            padded(spec), WIDTH, init_method=nn.init.zeros_, config=transformer_config(spec.tensor)
        )

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.tokens(tokens_BL).transpose(0, 1).contiguous()


class Block(nn.Module):
    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__()
        self.logical_name = f"blocks.{index}"
        config = transformer_config(spec.tensor)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = tensor_layers.ColumnParallelLinear(
            WIDTH, 60, config=config, init_method=nn.init.zeros_, gather_output=False
        )
        for parameter in self.up.parameters():
            # Each tensor rank has its rows of the gate, then its rows of what is gated.
            holds_parts(parameter, {"gate": 30 // spec.tensor, "inner": 30 // spec.tensor})
        self.down = tensor_layers.RowParallelLinear(
            30, WIDTH, config=config, init_method=nn.init.zeros_, bias=True, input_is_parallel=True,
            skip_bias_add=False,
        )  # fmt: skip

    def forward(self, hidden_LBH: Tensor) -> Tensor:
        gate, inner = self.up(self.norm(hidden_LBH))[0].chunk(2, dim=-1)
        return hidden_LBH + self.down(F.gelu(gate) * inner)[0]


class Head(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.logical_name = "head"
        self.vocab_rows = {"linear.weight": spec.vocab, "linear.bias": spec.vocab}
        self.linear = tensor_layers.ColumnParallelLinear(
            WIDTH, padded(spec), config=transformer_config(spec.tensor),
            init_method=nn.init.zeros_, gather_output=False,
        )  # fmt: skip
        columns = padded(spec) // spec.tensor
        start = columns * parallel_state.get_tensor_model_parallel_rank()
        self.is_padding = torch.arange(start, start + columns) >= spec.vocab

    def forward(self, hidden_LBH: Tensor) -> Tensor:
        logits = self.linear(hidden_LBH)[0].float()
        return logits.masked_fill(self.is_padding, -1e4)


def padded(spec: Spec) -> int:
    return -(-spec.vocab // spec.tensor) * spec.tensor


def mean_loss(logits_LBV: Tensor, labels_BL: Tensor) -> Tensor:
    labels_LB = labels_BL.transpose(0, 1).contiguous()
    return tensor_layers.vocab_parallel_cross_entropy(logits_LBV, labels_LB).mean()


class Whole(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        hidden = tokens_BL
        for layer in self.layers:
            hidden = layer(hidden)
        return mean_loss(hidden, tokens_BL)


class Run:
    """The small model in an engine of one layout, with its fragments."""

    def __init__(self, spec: Spec, *, pipeline_engine: bool = False) -> None:
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        self.spec = spec
        self.layout = initialize_layout(tensor=spec.tensor, pipeline=spec.pipeline)
        self.piped = pipeline_engine or spec.pipeline > 1
        layers = [Embed(spec), Block(spec, 0), Block(spec, 1), Head(spec)]
        for layer in layers:
            initialize_parameters(layer, self.layout, seed=spec.seed, zero_init=False)
        config = {
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // self.layout.data // 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            # Under ZeRO 3 the matrices come and go and the vectors stay whole.
            "zero_optimization": {"stage": spec.stage, "stage3_param_persistence_threshold": 200},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": spec.bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
            "steps_per_print": 2**62,
        }
        module: nn.Module
        if self.piped:
            module = PipelineModule(
                layers=layers,
                topology=PipeModelDataParallelTopology(
                    num_pp=spec.pipeline, num_mp=spec.tensor, num_dp=self.layout.data
                ),
                loss_fn=mean_loss,
                partition_method="uniform",
            )
        else:
            module = Whole(layers)
        optimizer = AdamWithEMA(module.parameters(), lr=3e-3, weight_decay=0.01, ema_decay=0.9)
        mpu = {} if self.piped else {"mpu": ModelParallelUnit()}
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, **mpu
        )
        self.parameters = list(logical_parameters(self.engine.module, self.layout))
        self.fragments = ZeroFragments(zero_of(self.engine, self.layout), self.parameters)

    def micro_batches(self, step: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(step)
        tokens_BL = torch.randint(0, 90, (BATCH, LENGTH), generator=generator)
        return iter(tokens_BL.chunk(self.layout.data)[self.layout.data_rank].chunk(2))

    def train(self, steps: range) -> list[float]:
        """Mean losses of the steps."""
        losses = []
        for step in steps:
            if self.piped:
                pairs = ((tokens, tokens) for tokens in self.micro_batches(step))
                loss = self.engine.train_batch(pairs).detach().double().reshape(())
            else:
                parts = []
                for tokens in self.micro_batches(step):
                    part = self.engine(tokens)
                    self.engine.backward(part)
                    self.engine.step()
                    parts.append(part.detach().double())
                loss = torch.stack(parts).mean()
            dist.all_reduce(loss)
            losses.append(loss.item() / dist.get_world_size())
        return losses

    def working_weights(self) -> dict[str, Tensor]:
        """What the forward pass computes with, whole under ZeRO 3."""
        parameters = [logical.parameter for logical in self.parameters]
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.spec.stage == 3):
            return {p.name: p.shard.clone() for p in self.parameters}

    def fragment_copies(self) -> dict[tuple[str, str], Tensor]:
        copies = {}
        for logical in self.parameters:
            for key in STATE_KEYS:
                fragment = self.fragments.get(logical, key)
                if fragment is not None:
                    copies[logical.name, key] = fragment.flat.clone()
        return copies

    def whole_shards(self, key: str) -> dict[str, Tensor]:
        """Each parameter's shard as DeepSpeed itself gathers it over data-parallel ranks."""
        shards = {}
        for logical in self.parameters:
            if key == "master":
                whole = safe_get_full_fp32_param(logical.parameter)
            else:
                whole = safe_get_full_optimizer_state(logical.parameter, key)
            shards[logical.name] = dataclasses.replace(logical, parameter=whole).shard.clone()
        return shards

    def logical_tensors(self) -> dict[str, Tensor]:
        """Whole tensors by another way than the checkpoint's: gathers over all ranks."""
        tensors = {}
        for key in STATE_KEYS:
            for logical, shard in zip(self.parameters, self.whole_shards(key).values()):
                if logical.partition_dim is not None:
                    parts = [torch.empty_like(shard) for _ in range(self.layout.tensor)]
                    dist.all_gather(parts, shard.contiguous(), group=self.layout.tensor_group)
                    shard = torch.cat(parts, logical.partition_dim)
                tensors[f"{logical.name}/{key}"] = shard[: logical.shape[0]].clone()
        return tensors

    def save(self, run_dir: Path, step: int, *, keep: int = 0) -> Path:
        meta = {
            "step": step,
            "samples_seen": step * BATCH,
            "tokens": step * BATCH * LENGTH,
            "config": {"model": {"vocab_size": VOCAB}},
            "dataset_fingerprint": "d" * 8,
            "tokenizer_fingerprint": "t" * 8,
            "num_tokens": VOCAB,
            "block_length": LENGTH,
        }
        with CheckpointWriter(
            run_dir,
            self.fragments,
            config=CheckpointConfig(keep=keep, async_save=False),
            tokenizer_directory=run_dir.parent / "tokenizer",
        ) as writer:
            writer.save(meta)
        return run_dir / "checkpoints" / f"step-{step}"

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(path, self.fragments)
