"""DeepSpeed's three optimizers behind one interface.

| engine                | optimizer                     | working weights                 |
|-----------------------|-------------------------------|---------------------------------|
| ZeRO 1 and bf16       | BF16_Optimizer                | bf16, gathered from the masters |
| ZeRO 1 fp32, ZeRO 2   | DeepSpeedZeroOptimizer        | a copy, gathered                |
| ZeRO 3                | DeepSpeedZeroOptimizer_Stage3 | a copy, partitioned alike       |
"""

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sedd_scale.engine.zero.base import GatheringZero, Place, Zero
from sedd_scale.engine.zero.bf16 import Bf16Zero
from sedd_scale.engine.zero.flat import FlatZero
from sedd_scale.engine.zero.partitioned import PartitionedZero
from sedd_scale.parallel.layout import Layout

_KINDS: dict[type, type[Zero]] = {
    BF16_Optimizer: Bf16Zero,
    DeepSpeedZeroOptimizer: FlatZero,
    DeepSpeedZeroOptimizer_Stage3: PartitionedZero,
}

__all__ = ["GatheringZero", "Place", "Zero", "zero_of"]


def zero_of(engine: Any, layout: Layout) -> Zero:
    """The optimizer of a DeepSpeedEngine or PipelineEngine."""
    return _KINDS[type(engine.optimizer)](engine, layout)
