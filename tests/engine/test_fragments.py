"""ZeRO fragments in every kind of engine: whole parameters, exact swaps, no gap unseen."""

import json
from pathlib import Path

from tests.distributed.runs import launch
from tests.repository import ROOT

WORKER = ROOT / "tests/checkpoint/checkpoint_worker.py"


def test_every_engine_gives_its_fragments(tmp_path: Path) -> None:
    """The laws are asserted in the workers; here, that every engine and optimizer was met."""
    launch(2, [str(WORKER), "fragments", str(tmp_path)])
    checked = json.loads((tmp_path / "fragments.json").read_text())["checked"]
    for kind in (
        "DeepSpeedEngine DeepSpeedZeroOptimizer",
        "DeepSpeedEngine BF16_Optimizer",
        "DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3",
        "PipelineEngine DeepSpeedZeroOptimizer",
        "PipelineEngine BF16_Optimizer",
    ):
        assert any(line.endswith(kind) for line in checked), kind
