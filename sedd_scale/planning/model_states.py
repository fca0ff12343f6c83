"""Bytes of weights, gradients and optimizer on one rank, as DeepSpeed allocates them.

n numbers on a rank, p those of its partition among the data-parallel ranks, both padded:

| engine            | weights            | gradients           | optimizer: masters, 2 moments, EMA |
|-------------------|--------------------|---------------------|------------------------------------|
| bf16, ZeRO 1      | 2n                 | 4n, one flat buffer | 16p                                |
| bf16, ZeRO 2      | 2n                 | 4p                  | 16p                                |
| fp32, ZeRO 1      | 4n                 | 4n, as autograd's   | 16p                                |
| fp32, ZeRO 2      | 4n                 | 4 x parameters that | 16p                                |
|                   |                    | touch the partition |                                    |
| ZeRO 3            | 2p or 4p, and the  | 4p                  | 16p                                |
|                   | small ones whole   |                     |                                    |

Source: deepspeed 0.19: BF16_Optimizer, DeepSpeedZeroOptimizer and DeepSpeedZeroOptimizer_Stage3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# DeepSpeed's defaults, in numbers (not bytes).
REDUCE_BUCKET = 500_000_000
PERSISTENT_PARAMETER = 100_000
MAX_LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000

BYTES = {"fp32": 4, "bf16": 2}
FLOAT32 = 4
# Masters, two moments and the moving average.
NUM_OPTIMIZER_TENSORS = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank that do not depend on the batch.

    Attributes:
        weights: what forward and backward passes read.
        gradients: what is held from the last backward pass to the update.
        optimizer: float32 masters, AdamW's two moments and the moving average.
        buckets: buffers that DeepSpeed fills with gradients to reduce during a backward pass.
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
    numels: Sequence[int], *, precision: str, zero_stage: int, data: int, pipeline: int
) -> StateBytes:
    """Bytes on the heaviest of `data` ranks that share parameters of these sizes.

    Args:
        numels: numbers of each of the rank's parameters (tensor-parallel shards), in order.
        precision: "fp32" or "bf16".
    """
    if zero_stage == 3:
        return _zero_3(numels, BYTES[precision], data)
    total = _aligned(sum(numels), 2 * data)
    partition = total // data
    # AdamW's foreach update makes one temporary of the partition's size.
    temporary = FLOAT32 * partition
    weight_bytes = BYTES[precision]
    optimizer = FLOAT32 * NUM_OPTIMIZER_TENSORS * partition
    if precision == "bf16" and zero_stage == 1:
        # Gradients are reduced as a bf16 copy of the flat buffer.
        return StateBytes(
            weights=weight_bytes * total,
            gradients=FLOAT32 * total,
            optimizer=optimizer,
            buckets=0,
            gathered=0,
            update=max(weight_bytes * total, temporary),
        )
    bucket = weight_bytes * REDUCE_BUCKET
    copied = weight_bytes * min(total, REDUCE_BUCKET)
    touching = FLOAT32 * max(_touching_partitions(numels, data))
    if precision == "bf16":
        gradients, update = FLOAT32 * partition, temporary
    elif zero_stage == 1:
        # The partition's gradients are copied out of the bucket, then once more into one tensor.
        gradients, update = FLOAT32 * sum(numels), touching + 2 * temporary
        # Outside the backward pass, the pipeline makes itself a second bucket.
        update += bucket if pipeline > 1 else 0
    else:
        # Each micro-batch makes its own copy before it is added to the first one's.
        gradients, update = touching, max(touching, 2 * temporary)
    # A bucket that fills before the backward pass has ended is reduced among the activations.
    early = copied if total > REDUCE_BUCKET else 0
    return StateBytes(
        weights=weight_bytes * total,
        gradients=gradients,
        optimizer=optimizer,
        buckets=bucket + early,
        gathered=0,
        update=max(update, copied),
    )


def _zero_3(numels: Sequence[int], weight_bytes: int, data: int) -> StateBytes:
    partition = sum(-(-numel // data) for numel in numels)
    whole = sum(numel for numel in numels if numel <= PERSISTENT_PARAMETER)
    sub_group = min(partition, SUB_GROUP)
    return StateBytes(
        weights=weight_bytes * (partition + whole),
        gradients=FLOAT32 * partition,
        optimizer=FLOAT32 * NUM_OPTIMIZER_TENSORS * partition,
        buckets=weight_bytes * (REDUCE_BUCKET + min(sum(numels), REDUCE_BUCKET)),
        gathered=weight_bytes * min(sum(numels) - whole, MAX_LIVE_PARAMETERS),
        # The flattened gradient of a sub-group and the update's temporary.
        update=2 * FLOAT32 * sub_group,
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
