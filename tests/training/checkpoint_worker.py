"""One process of the launches that test fragments and checkpoints; see `launch` in the tests.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. MASTER_PORT=.. python checkpoint_worker.py SCENARIO FOLDER

A process takes several layouts one after the other, since its imports cost more than its work. What
it finds is written to FOLDER/SCENARIO.json by the first process; laws that need all processes are
asserted here.
"""

import dataclasses
import errno
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
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
from torch.distributed.checkpoint import FileSystemWriter

from sedd_scale.errors import CheckpointError
from sedd_scale.model.parameters import initialize_parameters, logical_parameters
from sedd_scale.parallel.fragments import STATE_KEYS, ZeroFragments
from sedd_scale.parallel.layout import ModelParallelUnit, initialize_layout, shutdown
from sedd_scale.training.checkpoint import load_checkpoint, save_checkpoint
from sedd_scale.training.optimizer import AdamWithEMA

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
            WIDTH, 30, config=config, init_method=nn.init.zeros_, gather_output=False
        )
        self.down = tensor_layers.RowParallelLinear(
            30, WIDTH, config=config, init_method=nn.init.zeros_, bias=True, input_is_parallel=True,
            skip_bias_add=False,
        )  # fmt: skip

    def forward(self, hidden_LBH: Tensor) -> Tensor:
        return hidden_LBH + self.down(F.gelu(self.up(self.norm(hidden_LBH))[0]))[0]


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
        self.fragments = ZeroFragments(self.engine, self.parameters)

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
            return {p.name: p.parameter.detach().clone() for p in self.parameters}

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
            shards[logical.name] = whole.view(logical.local_shape).clone()
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
        return save_checkpoint(
            run_dir,
            engine_fragments=self.fragments,
            parameters=self.parameters,
            layout=self.layout,
            meta=meta,
            tokenizer_directory=run_dir.parent / "tokenizer",
            keep=keep,
        )

    def load(self, path: Path) -> dict[str, Any]:
        return load_checkpoint(
            path,
            engine_fragments=self.fragments,
            parameters=self.parameters,
            layout=self.layout,
        )


def assert_equal(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def fragments_scenario(_: Path) -> dict[str, Any]:
    """Two processes: every engine and precision."""
    checked = []
    for spec, piped in [
        (Spec(stage=1), False),
        (Spec(stage=2), False),
        (Spec(stage=3), False),
        (Spec(stage=1, bf16=True), False),
        (Spec(stage=2, bf16=True), False),
        (Spec(stage=3, bf16=True), False),
        (Spec(tensor=2, stage=3), False),
        (Spec(stage=1), True),
        (Spec(pipeline=2, stage=1), True),
        (Spec(pipeline=2, stage=1, bf16=True), True),
    ]:
        run = Run(spec, pipeline_engine=piped)
        check_fragments(run)
        checked.append(f"{spec} {type(run.engine).__name__} {type(run.engine.optimizer).__name__}")
    return {"checked": checked}


def check_fragments(run: Run) -> None:
    fragments = run.fragments
    assert fragments.get_step() == 0
    fragments.ensure_state()
    initial = run.fragment_copies()
    for (name, key), flat in initial.items():
        if key == "ema":
            assert torch.equal(flat, initial[name, "master"])
        elif key != "master":
            assert not flat.any()

    run.train(range(2))
    assert fragments.get_step() == 2
    for key in STATE_KEYS:
        for logical, shard in zip(run.parameters, run.whole_shards(key).values(), strict=True):
            fragment = fragments.get(logical, key)
            if fragment is not None:
                end = fragment.start + fragment.flat.numel()
                assert torch.equal(fragment.flat, shard.flatten()[fragment.start : end])

    # In the averaged weights' place and back: nothing changes by a bit, nor does what follows.
    state, weights = run.fragment_copies(), run.working_weights()
    averages = run.whole_shards("ema")
    with fragments.ema_weights():
        for name, value in run.working_weights().items():
            assert torch.equal(value, averages[name].to(value.dtype)), name
            assert not torch.equal(value, weights[name]), name
        if not run.piped:
            run.engine.eval()
            with torch.no_grad():
                run.engine(next(run.micro_batches(0)))
            run.engine.train()
    assert_equal(run.fragment_copies(), state)
    assert_equal(run.working_weights(), weights)

    # What is written to the masters reaches the weights that the forward pass reads.
    for logical in run.parameters:
        fragment = fragments.get(logical, "master")
        if fragment is not None:
            fragment.flat.mul_(1.5)
    fragments.refresh_parameters()
    masters = run.whole_shards("master")
    for name, value in run.working_weights().items():
        assert torch.equal(value, masters[name].to(value.dtype)), name
    assert all(loss < 100 for loss in run.train(range(2, 3)))
    fragments.set_step(40)
    assert fragments.get_step() == 40

    if run.layout.data > 1:  # a gap is noticed by every rank
        name = next(n for n, place in fragments._places.items() if place is not None)
        names: list[Any] = [None] * run.layout.data
        dist.all_gather_object(names, name, group=run.layout.data_group)
        if run.layout.data_rank == 0:
            fragments._places[name] = dataclasses.replace(fragments._places[name], start=1)
        try:
            fragments._assert_tiled(run.parameters)
        except AssertionError as error:
            assert names[0] in str(error)
        else:
            raise AssertionError("a gap was not noticed")


def save_scenario(folder: Path) -> dict[str, Any]:
    """Four processes: save under one layout, load under it and under others."""
    spec = Spec(tensor=2, stage=3)
    run = Run(spec)
    run.train(range(3))
    run.save(folder / "zero3", 3)
    tensors = run.logical_tensors()
    if run.layout.rank == 0:
        torch.save(tensors, folder / "tensors.pt")
    results: dict[str, Any] = {"reference": run.train(range(3, 6))}

    same = Run(dataclasses.replace(spec, seed=1))
    meta = same.load(folder / "zero3")
    assert meta["step"] == 3 and meta["optimizer_step"] == 3 and same.fragments.get_step() == 3
    same.save(folder / "again", 3)
    results["same layout"] = same.train(range(3, 6))

    pipeline = Run(Spec(tensor=2, pipeline=2, seed=1))
    pipeline.load(folder / "zero3" / "checkpoints")
    pipeline.save(folder / "pipeline", 3)
    results["TP2 PP2 ZeRO1"] = pipeline.train(range(3, 6))

    data = Run(Spec(stage=2, seed=1))
    data.load(folder / "pipeline")
    results["DP4 ZeRO2, from TP2 PP2"] = data.train(range(3, 6))

    bf16 = Run(Spec(tensor=2, bf16=True, seed=1))
    bf16.load(folder / "zero3" / "checkpoints" / "step-3")
    results["bf16 from fp32"] = bf16.train(range(3, 5))
    bf16.save(folder / "bf16", 5)
    results["bf16"] = bf16.train(range(5, 8))
    bf16 = Run(Spec(tensor=2, bf16=True, seed=1))
    bf16.load(folder / "bf16")
    results["bf16 resumed"] = bf16.train(range(5, 8))

    other = Run(Spec(tensor=2, pipeline=2, vocab=103))
    other.fragments.ensure_state()
    state, weights = other.fragment_copies(), other.working_weights()
    if other.layout.rank == 0:
        shutil.copytree(folder / "zero3", folder / "short")
        os.truncate(folder / "short" / "checkpoints" / "step-3" / "__2_0.distcp", 500)
    results["load errors"] = [
        error_of(lambda path=path: other.load(folder / path))
        for path in ("zero3", "nothing", "short")
    ]
    assert_equal(other.fragment_copies(), state)
    assert_equal(other.working_weights(), weights)

    results["save errors"] = [error_of(lambda: other.save(folder / "tensors.pt", 1))]
    if other.layout.rank == 3:
        FileSystemWriter.write_data = full_disk
    results["save errors"].append(error_of(lambda: other.save(folder / "zero3", 4)))
    return results


def full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def error_of(call: Callable[[], Any]) -> str:
    """The CheckpointError that every process must raise alike."""
    try:
        call()
    except CheckpointError as error:
        message = str(error)
    else:
        message = "no error"
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    assert len(set(messages)) == 1, messages
    return message


def two_scenario(folder: Path) -> dict[str, Any]:
    """Two processes load what four saved."""
    results = {}
    for name, spec in {
        "DP2 ZeRO1": Spec(stage=1, seed=1),
        "TP2 ZeRO2": Spec(tensor=2, stage=2, seed=1),
        "PP2": Spec(pipeline=2, seed=1),
    }.items():
        run = Run(spec)
        run.load(folder / "zero3")
        results[name] = run.train(range(3, 6))
    return results


def one_scenario(folder: Path) -> dict[str, Any]:
    """One process loads what four saved, and saves often."""
    run = Run(Spec(seed=1))
    run.load(folder / "zero3")
    results: dict[str, Any] = {"DP1": run.train(range(3, 6))}
    kept = folder / "kept"
    (kept / "checkpoints" / "step-9.tmp").mkdir(parents=True)
    listings = []
    for step in (5, 6, 7, 7, 8):
        run.save(kept, step, keep=2)
        names = sorted(path.name for path in (kept / "checkpoints").iterdir())
        listings.append([*names, (kept / "checkpoints" / "latest").read_text()])
    results["listings"] = listings
    return results


def reform(num_processes: int) -> bool:
    """Go on with the first `num_processes` as if newly launched; whether this one is among them."""
    rank = dist.get_rank()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port)
    shutdown()
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    os.environ["MASTER_PORT"] = str(port[0])
    os.environ["WORLD_SIZE"] = str(num_processes)
    if rank >= num_processes:
        return False
    initialize_layout()
    return True


def resume_scenario(folder: Path) -> dict[str, Any]:
    """Four processes, then two, then one."""
    results = save_scenario(folder)
    for num_processes, scenario in ((2, two_scenario), (1, one_scenario)):
        if not reform(num_processes):
            return {}
        results |= scenario(folder)
    return results


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    scenarios = {"fragments": fragments_scenario, "resume": resume_scenario}
    results = scenarios[scenario](folder)
    if os.environ["RANK"] == "0":
        (folder / f"{scenario}.json").write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
