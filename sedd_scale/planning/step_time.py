"""Seconds of a training step by arithmetic: products, passes over memory, exchange and waits.

Each part is a number of operations or bytes over what a device reaches of its peak. The figures of
`DEVICES` are what published measurements and data sheets lead one to expect; measured ones may be
given in their place. Predictions are for finding what limits a layout, and are to be checked
against a measurement before anything is promised.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sedd_scale.config import Config, TrunkShape
from sedd_scale.errors import ConfigError
from sedd_scale.planning.activations import GPU_CHUNK_BYTES, MIN_CHUNK_ROWS
from sedd_scale.planning.flops import StepFlops
from sedd_scale.planning.layouts import Plan
from sedd_scale.planning.model_states import BYTES, EXCHANGE_BUCKET
from sedd_scale.planning.parameters import num_states


@dataclass(frozen=True)
class Device:
    """What one device reaches; FLOP/s, bytes/s and seconds.

    Attributes:
        products: matrix products in the training's precision.
        attention, attention_backward: the L x L products, forward and backward.
        memory: bytes that passes over memory read and write.
        node: bytes that one device sends to others of its node.
        network: bytes that one device's port sends to other nodes.
        launch: the host's time to start one kernel.
        per_node: devices that share a node.
        update: bytes that the optimizer reads and writes; 0: as `memory`.
    """

    products: float
    attention: float
    attention_backward: float
    memory: float
    node: float
    network: float
    launch: float = 5e-6
    per_node: float = 8
    update: float = 0.0


# bf16. Products: 0.65 to 0.7 of the peak; memory: 0.85 of the data sheet; a 400 Gb/s port per GPU.
DEVICES = {
    "a100": Device(210e12, 160e12, 130e12, 1.3e12, 2.0e11, 2.0e10),
    "h100": Device(670e12, 480e12, 400e12, 2.9e12, 3.0e11, 4.0e10),
    "h200": Device(670e12, 480e12, 400e12, 4.1e12, 3.0e11, 4.0e10),
    "b200": Device(1500e12, 1000e12, 850e12, 6.8e12, 6.0e11, 4.0e10),
}


def read_rates(path: Path) -> Device:
    """The device that `sedd-scale benchmark rates --output` wrote. Raises ConfigError."""
    try:
        numbers = json.loads(path.read_text())
        for name in ("products", "attention", "attention_backward", "memory"):
            if not float(numbers[name]) > 0:
                raise ValueError(f"{name} is {numbers[name]}")
        return Device(**{name: float(number) for name, number in numbers.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no rates ({error}): write it with sedd-scale benchmark rates --output"
        ) from None


# Of the launches that are left on the host's side in a micro-batch's block, forward and backward.
LAUNCHES_PER_BLOCK = 78
# From when a step's numbers are read to the first kernels of the next; the update runs meanwhile.
WAIT_SECONDS = 1.0e-3


# Of a parameter: AdamW and the average on float32 numbers, and the weight that is made of them.
UPDATE_BYTES = 32 + 12


def block_bytes(trunk: TrunkShape, *, residual: int, weight: int) -> dict[str, int]:
    """Bytes that one block's passes read and write on a GPU for each position.

    Sums over positions are made in the pass that has the numbers; what they add is left out, less
    than a hundredth.

    Args:
        residual, weight: bytes of a number of the stream, and of weights and activations.
    """
    kept = 0 if residual == weight else weight  # what a norm makes of a wider stream
    values = trunk.qkv_rows - trunk.turned_rows
    return {
        # Stream in; modulated norm out.
        "norms forward": 2 * trunk.width * (residual + weight + kept),
        # Two gradients and the stream, or what was kept of it, in; one gradient out.
        "norms backward": 2 * trunk.width * (2 * weight + 2 * residual),
        # Stream and update in, stream out.
        "gates forward": 2 * trunk.width * (2 * residual + weight),
        # Gradient and update in, the update's gradient out.
        "gates backward": 2 * trunk.width * (residual + 2 * weight),
        # Query and key in and out in both directions; a value's gradient to beside theirs.
        "rotary turns": 2 * weight * (2 * trunk.turned_rows + values),
        # As the turns, and what adds up to their weights' gradients, written and read in float32.
        "norms of queries and keys": trunk.qk_norm * trunk.turned_rows * (5 * weight + 8),
        # Forward in and out; backward two in, one out.
        "activation": weight * (3 * trunk.inner_rows + 2 * trunk.inner),
    }


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of one optimizer step of a layout, on its busiest device.

    Attributes:
        parts: seconds by part; they add up to `seconds`.
        seconds: of a step.
        tokens_per_second: over all devices.
        mfu: required FLOPs over the peak of all devices.
    """

    parts: Mapping[str, float]
    seconds: float
    tokens_per_second: float
    mfu: float

    @property
    def limit(self) -> str:
        """What takes the most time besides the products and attention, which are the work."""
        others = {name: part for name, part in self.parts.items() if name not in WORK}
        return max(others, key=lambda name: others[name])


WORK = ("products", "attention", "head's products")


def step_time(
    config: Config,
    planned: Plan,
    *,
    vocab_size: int,
    block_length: int,
    device: Device,
    peak: float,
) -> StepTime:
    """Predict a step of `planned`.

    Args:
        vocab_size: N, the number of real tokens.
        block_length: L.
        device: what one of its devices reaches.
        peak: FLOP/s that `mfu` is taken of.

    Raises:
        ConfigError: several devices, and rates that one process measured by itself.
    """
    if planned.gpus > 1 and not device.node:
        raise ConfigError(
            f"rates of one process say nothing of what {planned.gpus} exchange: measure them with "
            "several (torchrun -m sedd_scale benchmark rates), or give --gpus 1"
        )
    model, parallel, training = config.model, planned.parallel, config.training
    weight, residual = BYTES[training.precision], BYTES[model.residual_dtype]
    width, blocks = model.hidden_size, -(-model.num_layers // parallel.pipeline)
    tokens = training.micro_batch * block_length
    count = planned.accumulation
    heaviest = planned.heaviest
    # A whole block's forward pass once more, of every k-th.
    again = 1 / parallel.recompute_every if parallel.recompute_every else 0.0
    products_again = again if parallel.recompute_mode == "full" else 0.0

    trunk = config.trunk
    linear = 2 * trunk.products * tokens * blocks / parallel.tensor
    attention = 4 * block_length * trunk.query_rows * tokens * blocks / parallel.tensor
    rows = planned.flops.head_rows * tokens
    states = -(-num_states(config, vocab_size) // parallel.tensor)
    head = 2 * width * states * rows
    passes = block_bytes(trunk, residual=residual, weight=weight)
    forward = sum(size for name, size in passes.items() if "forward" in name)
    # Norms and gates of the stream are shared over the sequence, the others over tensor ranks.
    shared = parallel.tensor if parallel.sequence_parallel else 1
    of_stream = sum(size for name, size in passes.items() if name.endswith(("forward", "backward")))
    streamed, split = of_stream / shared, (sum(passes.values()) - of_stream) / parallel.tensor
    positions = tokens * blocks
    chunk = max(MIN_CHUNK_ROWS, GPU_CHUNK_BYTES // (4 * states))
    chunks = -(-rows // chunk)
    of_micro_batch = {
        "products": linear * (3 + products_again) / device.products,
        "attention": attention * (1 + products_again) / device.attention
        + 2.5 * attention / device.attention_backward,
        "passes over memory": positions * (streamed + split + again * forward) / device.memory,
        "head's products": 3 * head / device.products,
        # Statistics read float32 logits, and so does their gradient, which is written.
        "head's passes": ((4 + 4 + weight) * rows * states + chunks * 8 * states * width)
        / device.memory,
        "tensor ranks": _tensor_seconds(config, planned, tokens * width * weight, device),
    }
    queued = blocks * LAUNCHES_PER_BLOCK * device.launch
    busy = sum(of_micro_batch.values())
    of_micro_batch["launches that the device waits for"] = max(0.0, queued - busy)
    parts = {name: count * seconds for name, seconds in of_micro_batch.items()}
    if weight < 4:  # the first micro-batch's are written, the others' added
        converted = (6 + 10 * (count - 1)) * heaviest.parameters
        parts["gradients to float32"] = converted / device.memory
    if parallel.pipeline > 1:
        parts["pipeline's bubble"] = sum(parts.values()) * (parallel.pipeline - 1) / count
    update = UPDATE_BYTES * heaviest.parameters / planned.data + 4 * heaviest.parameters
    parts["update"] = update / (device.update or device.memory)
    parts["exchange of gradients and weights"] = _exchange_seconds(
        planned, weight, count, device, forward=sum(of_micro_batch.values()) / 3
    )
    parts["waits of the host"] = max(0.0, WAIT_SECONDS - parts["update"])
    seconds = sum(parts.values())
    return StepTime(
        parts=parts,
        seconds=seconds,
        tokens_per_second=training.global_batch * block_length / seconds,
        mfu=_utilisation(planned.flops, planned.gpus, seconds, peak),
    )


def _utilisation(flops: StepFlops, gpus: int, seconds: float, peak: float) -> float:
    return flops.required / (gpus * seconds * peak)


def _tensor_seconds(config: Config, planned: Plan, stream: float, device: Device) -> float:
    """Collectives of the tensor ranks in one micro-batch; they stay within a node."""
    parallel = planned.parallel
    if parallel.tensor == 1:
        return 0.0
    blocks = -(-config.model.num_layers // parallel.pipeline)
    rings = blocks * (8 + 2 * parallel.sequence_parallel)
    if parallel.recompute_every:
        rings += 4 * blocks // parallel.recompute_every
    return rings * stream * (parallel.tensor - 1) / parallel.tensor / device.node


def _exchange_seconds(
    planned: Plan, weight: int, count: int, device: Device, *, forward: float
) -> float:
    """Reductions and gathers over the data-parallel ranks, less what lies under the passes.

    Args:
        forward: seconds of a forward pass; a backward pass takes twice that.
    """
    data, parallel = planned.data, planned.parallel
    if data == 1:
        return 0.0
    parameters = planned.heaviest.parameters
    if planned.gpus <= device.per_node:
        bandwidth = device.node
    else:
        # Rings run through the ports of all of a node's ranks that are in the group.
        of_node = max(1, device.per_node // parallel.tensor)
        bandwidth = min(device.node, of_node * device.network)
    copy = weight * parameters * (data - 1) / data / bandwidth  # once around, in the weights' type
    if parallel.zero_stage == 3:
        return 3 * count * copy  # what DeepSpeed prefetches of it is not counted
    # The first layers' bucket is reduced when the backward pass has ended, and gathered before the
    # forward pass begins.
    bare = min(1.0, EXCHANGE_BUCKET / parameters)
    gather = _not_hidden(copy, forward, bare)
    if parallel.zero_stage == 2:
        return count * _not_hidden(copy, 2 * forward, bare) + (copy if weight == 4 else gather)
    reduction = 4 / weight * copy  # in float32
    if weight == 4 and parallel.pipeline > 1:
        return reduction + gather
    return _not_hidden(reduction, 2 * forward, bare) + gather


def _not_hidden(exchange: float, under: float, bare: float) -> float:
    """Seconds of an exchange beyond the pass it lies under, of which a part lies bare."""
    return max(exchange * bare, exchange - under * (1 - bare))
