"""Bytes of weights, gradients and optimizer on one rank, as DeepSpeed allocates them.

n numbers on a rank, p those of its partition among the data-parallel ranks, both padded:

| engine       | weights           | gradients                     | masters, moments, EMA |
|--------------|-------------------|-------------------------------|-----------------------|
| bf16, ZeRO 1 | 2n                | 4n, one flat buffer           | 16p                   |
| bf16, ZeRO 2 | 2n                | 4p                            | 16p                   |
| fp32, ZeRO 1 | 4n                | 4n; one replica: flat buffer  | 16p                   |
| fp32, ZeRO 2 | 4n                | 4 x what touches a partition  | 16p                   |
| ZeRO 3       | 2p or 4p, and the | 4p                            | 16p                   |
|              | small ones whole  |                               |                       |

Of matrices that Muon updates there are 12p: one moment less.

Source: deepspeed 0.19: BF16_Optimizer, DeepSpeedZeroOptimizer and DeepSpeedZeroOptimizer_Stage3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# What the engine asks DeepSpeed for, or its defaults, in numbers (not bytes). The first is how many
# gradients travel between data-parallel ranks at once.
REDUCE_BUCKET = 50_000_000
# The same of ZeRO 1 in bf16: enough for full bandwidth, few enough for the first to start early.
EXCHANGE_BUCKET = 25_000_000
PERSISTENT_PARAMETER = 100_000
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000

BYTES = {"fp32": 4, "bf16": 2}
FLOAT32 = 4


@dataclass(frozen=True)
class UpdateRule:
    """How a parameter is updated, as far as what is kept of it goes.

    Attributes:
        moments: names of what the rule itself keeps, each of the parameter's shape.
    """

    moments: tuple[str, ...]

    @property
    def state_keys(self) -> tuple[str, ...]:
        """All that is kept in float32: the weight, the moments and the moving average."""
        return ("master", *self.moments, "ema")


ADAMW = UpdateRule(("exp_avg", "exp_avg_sq"))
MUON = UpdateRule(("momentum",))
STATE_KEYS = ADAMW.state_keys


def update_rule(optimizer: str, name: str) -> UpdateRule:
    """How `optimizer.name` updates a parameter, by its logical name: Muon the trunk's matrices."""
    layer, *_, kind = name.split(".")
    is_matrix = layer == "blocks" and ".linear_" in name and kind == "weight"
    return MUON if optimizer == "muon" and is_matrix else ADAMW


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank that do not depend on the batch.

    Attributes:
        weights: what forward and backward passes read.
        gradients: what is held from the last backward pass to the update.
        optimizer: float32 masters, AdamW's two moments and the moving average.
        buckets: gradients on their way between ranks during a backward pass.
        gathered: whole weights that ZeRO 3 may have gathered at one time.
        update: temporaries of the reduction and the update, when activations are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    update: int


def state_bytes(
    numels: Sequence[int],
    *,
    precision: str,
    zero_stage: int,
    data: int,
    pipeline: int,
    kept: float = len(STATE_KEYS),
) -> StateBytes:
    """Bytes on the heaviest of `data` ranks that share parameters of these sizes.

    Args:
        numels: numbers of each of the rank's parameters (tensor-parallel shards), in order.
        precision: "fp32" or "bf16".
        kept: float32 numbers of the optimizer for each, on average.
    """
    if zero_stage == 3:
        return _zero_3(numels, BYTES[precision], data, kept)
    total = _aligned(sum(numels), 2 * data)
    partition = total // data
    weight_bytes = BYTES[precision]
    optimizer = round(FLOAT32 * kept * partition)
    if precision == "bf16" and zero_stage == 1:
        # Reduced, clipped and read where they are: engine/zero/bf16.py.
        return StateBytes(
            weights=weight_bytes * total,
            gradients=FLOAT32 * total,
            optimizer=optimizer,
            buckets=0,
            gathered=0,
            update=0,
        )
    touching = FLOAT32 * max(_touching_partitions(numels, data))
    # Two buckets alternate (one in a pipeline); with one replica gradients are not copied to a
    # bucket. A parameter larger than a bucket travels by itself, and what travels is copied once.
    travelling = weight_bytes * min(total, max(REDUCE_BUCKET, *numels))
    buckets = 0
    if data > 1:
        buckets = weight_bytes * (1 if pipeline > 1 else 2) * REDUCE_BUCKET + travelling
    if precision == "bf16":
        gradients, update = FLOAT32 * partition, 0
        buckets = max(buckets, travelling)
    elif zero_stage == 1 and data == 1:
        gradients, update = FLOAT32 * total, 0  # updated where they are: engine/zero/flat.py
    elif zero_stage == 1:
        # The partition's gradients are copied out of the buckets, then once more into one tensor.
        gradients, update = FLOAT32 * sum(numels), FLOAT32 * partition + touching
    else:
        # Each micro-batch makes its own copy before it is added to the first one's; the update
        # makes one that is no larger.
        gradients, update = touching, touching
        buckets = max(buckets, touching if data == 1 else 0)
    if pipeline > 1 and data > 1:
        # Outside the backward pass, a pipeline makes itself one bucket more.
        update += weight_bytes * REDUCE_BUCKET
    return StateBytes(
        weights=weight_bytes * total,
        gradients=gradients,
        optimizer=optimizer,
        buckets=buckets,
        gathered=0,
        update=update,
    )


def _zero_3(numels: Sequence[int], weight_bytes: int, data: int, kept: float) -> StateBytes:
    partition = sum(-(-numel // data) for numel in numels)
    whole = sum(numel for numel in numels if numel <= PERSISTENT_PARAMETER)
    travelling = min(sum(numels), max(REDUCE_BUCKET, *numels))
    return StateBytes(
        weights=weight_bytes * (partition + whole),
        gradients=FLOAT32 * partition,
        optimizer=round(FLOAT32 * kept * partition),
        buckets=weight_bytes * (REDUCE_BUCKET + travelling),
        gathered=weight_bytes * min(sum(numels) - whole, MAX_LIVE_PARAMETERS),
        # The flattened gradient of a sub-group.
        update=FLOAT32 * min(partition, SUB_GROUP),
    )


def _aligned(numel: int, unit: int) -> int:
    return -(-numel // unit) * unit


def _touching_partitions(numels: Sequence[int], data: int) -> Iterator[int]:
    """For each rank the numbers of all parameters that lie in its partition, whole or in part."""
    size = _aligned(sum(numels), 2 * data) // data
    begin = 0
    ranges = []
    for numel in numels:
        ranges.append((begin, begin + numel))
        begin += numel
    first = 0
    for rank in range(data):
        start, end = rank * size, (rank + 1) * size
        while first < len(ranges) and ranges[first][1] <= start:
            first += 1
        total, index = 0, first
        while index < len(ranges) and ranges[index][0] < end:
            total += ranges[index][1] - ranges[index][0]
            index += 1
        yield total
