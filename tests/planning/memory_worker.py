"""Train two steps under several layouts and report the bytes DeepSpeed holds, by what they are for.

    torchrun --nproc-per-node N memory_worker.py JOBS.json

JOBS.json lists {"overrides": [...], "reports": DIR}; each rank writes DIR/RANK.json with its stage
and the bytes of unique storages: weights and optimizer after a step, gradients at their most
between the backward passes and the update, buckets that live on, and everything else gc finds.
"""

import functools
import gc
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.")

import torch  # noqa: E402

from sedd_scale.config import Config, load_config  # noqa: E402
from sedd_scale.diffusion.graphs import Graph, make_graph  # noqa: E402
from sedd_scale.diffusion.schedules import schedule_of  # noqa: E402
from sedd_scale.engine.engine import MicroBatch, make_engine  # noqa: E402
from sedd_scale.model.network import layer_builders  # noqa: E402
from sedd_scale.parallel.layout import (  # noqa: E402
    Layout,
    initialize_layout,
    leave_layout,
    shutdown,
)
from sedd_scale.parallel.vocab import score_targets  # noqa: E402
from sedd_scale.training.optimizer import make_optimizer  # noqa: E402
from tests.diffusion.reference import noise_columns  # noqa: E402

Storages = dict[int, int]


def storages(tensors: Iterable[Any]) -> Storages:
    """Address and bytes of each storage behind the tensors."""
    found = {}
    for tensor in tensors:
        # By type alone: to ask some objects that gc finds for their class is to import or to warn.
        if issubclass(type(tensor), torch.Tensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def without(found: Storages, *others: Storages) -> Storages:
    """What is in none of the others."""
    taken = set(itertools.chain(*others))
    return {address: size for address, size in found.items() if address not in taken}


def total(found: Storages) -> int:
    """Bytes in all."""
    return sum(found.values())


def weights(deepspeed_engine: Any) -> Storages:
    """What forward and backward passes read: parameters, and their partitions under ZeRO 3."""
    parameters = list(deepspeed_engine.module.parameters())
    partitions = [getattr(parameter, "ds_tensor", None) for parameter in parameters]
    return storages([*parameters, *partitions])


def optimizer(zero: Any) -> Storages:
    """Masters, moments and averages."""
    masters = [p for group in zero.optimizer.param_groups for p in group["params"]]
    for name in (
        "fp32_groups_flat_partition",
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
    ):
        masters += getattr(zero, name, [])
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    return storages([*masters, *states])


def buckets(zero: Any) -> Storages:
    """DeepSpeed's reduction buckets."""
    found = []
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        found += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    return storages(found)


def gradients(deepspeed_engine: Any) -> Storages:
    """Gradients of parameters, and wherever DeepSpeed gathers them."""
    zero = deepspeed_engine.optimizer
    found = [parameter.grad for parameter in deepspeed_engine.module.parameters()]
    for name in ("fp32_groups_gradients_flat", "flat_gradients"):
        found += getattr(zero, name, [])
    found.append(getattr(zero, "grad_partitions_flat_buffer", None))
    for name in ("averaged_gradients", "all_grad_tensors"):
        for tensors in getattr(zero, name, {}).values():
            found += tensors or []
    return without(storages(found), buckets(zero))


def before(owner: Any, method: str, observe: Callable[[], None]) -> None:
    """Let a method of one object call `observe` first."""
    original = getattr(owner, method)

    def observed(*arguments: Any, **options: Any) -> Any:
        observe()
        return original(*arguments, **options)

    setattr(owner, method, observed)


def micro_batch(config: Config, graph: Graph, seed: int) -> MicroBatch:
    """Random tokens, corrupted."""
    generator = torch.Generator().manual_seed(seed)
    assert config.data.block_length is not None
    shape = (config.training.micro_batch, config.data.block_length)
    clean = torch.randint(graph.num_tokens, shape, generator=generator)
    t = 0.2 + 0.7 * torch.rand(shape[0], generator=generator, dtype=torch.float64)
    noise = noise_columns(schedule_of(config), t)
    move, token = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    noisy = graph.corrupt(clean, noise[:, 0], move, token)
    targets = score_targets(graph, clean_BL=clean, noisy_BL=noisy, noise_B3=noise)
    keys = torch.randint(2**62, (shape[0],), generator=generator)
    return MicroBatch((noisy, noise[:, 0].float(), keys), targets)


def measure(config: Config, layout: Layout) -> dict[str, int]:
    """Train two steps; bytes by category on this rank."""
    assert config.model.vocab_size is not None
    graph = make_graph(config.graph.name, config.model.vocab_size)
    gc.collect()
    earlier = storages(gc.get_objects())
    engine = make_engine(
        layer_builders(config, graph, layout),
        layout,
        config,
        functools.partial(make_optimizer, config),
    )
    deepspeed_engine = engine._deepspeed
    zero = deepspeed_engine.optimizer
    most = 0

    def observe() -> None:
        nonlocal most
        most = max(most, total(gradients(deepspeed_engine)))

    # The engine steps after each micro-batch; a pipeline reduces after all of them.
    before(deepspeed_engine, "_exec_reduce_grads" if layout.pipeline > 1 else "step", observe)
    before(zero, "step", observe)
    accumulation = config.accumulation(layout.world_size)
    for step in range(2):
        first = (step * layout.data + layout.data_rank) * accumulation
        batches = [micro_batch(config, graph, first + index) for index in range(accumulation)]
        engine.train_step(batches, lr=1e-4)
    del batches
    gc.collect()
    found_weights, found_buckets = weights(deepspeed_engine), buckets(zero)
    found_optimizer = without(optimizer(zero), found_weights)
    named = (found_weights, found_optimizer, found_buckets, gradients(deepspeed_engine))
    return {
        "stage": layout.pipeline_rank,
        "weights": total(found_weights),
        "optimizer": total(found_optimizer),
        "gradients": most,
        "buckets": total(found_buckets),
        "other": total(without(storages(gc.get_objects()), *named, earlier)),
    }


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config("configs/runs/tiny.yaml", job["overrides"])
        parallel = config.parallel
        layout = initialize_layout(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            sequence_parallel=parallel.sequence_parallel,
        )
        config.validate(layout.world_size)
        report = json.dumps(measure(config, layout))
        (Path(job["reports"]) / f"{layout.rank}.json").write_text(report)
        leave_layout()
    shutdown()


main()
