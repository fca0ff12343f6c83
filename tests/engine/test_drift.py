"""Replicas that stay replicas, and hosts that wait for no reduction; two processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs import launch
from tests.repository import ROOT

WORKER = ROOT / "tests/engine/drift_worker.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("drift")
    launch(2, [str(WORKER), str(folder)])
    return [json.loads(Path(folder, f"found-{rank}.json").read_text()) for rank in range(2)]


def test_a_sum_in_another_order_on_one_rank_moves_no_replica(found: list[dict[str, Any]]) -> None:
    """By one unit in the last place; if each kept its own gradient, the run would end."""
    for of_rank in found:
        assert "tensor-parallel ranks" in of_rank["alone"]
        assert of_rank["healed"] == "the same"


@pytest.mark.parametrize("name", ["ZeRO 1", "ZeRO 2", "ZeRO 2 bf16"])
def test_streams_wait_for_each_other_and_the_host_for_none(
    found: list[dict[str, Any]], name: str
) -> None:
    for of_rank in found:
        waits = of_rank[name]
        assert not [wait for wait in waits if wait.startswith("the host")], waits
        assert "reduction waits for compute" in waits  # for what is to be reduced
        assert waits[-1] == "compute waits for reduction"  # for what was reduced


EXCHANGES = ["ZeRO 1 bf16", "ZeRO 1 fp32", "ZeRO 2 bf16"]


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_layer_reads_no_weight_before_it_was_gathered(
    found: list[dict[str, Any]], name: str
) -> None:
    """Losses, averages and replicas are the same however late reductions and gathers come."""
    for of_rank in found:
        late, at_once = (of_rank[f"exchange of {name}"][when] for when in ("late", "at once"))
        assert late["losses"] == at_once["losses"]
        assert late["average"] == at_once["average"]


@pytest.mark.parametrize("name", EXCHANGES)
def test_weights_travel_under_the_next_forward_pass(found: list[dict[str, Any]], name: str) -> None:
    """The first layers compute while the last ones' weights are still on their way."""
    for of_rank in found:
        events = of_rank[f"exchange of {name}"]["late"]["events"]
        gathered = [at for at, event in enumerate(events) if event == "gather ends"]
        assert len(gathered) == events.count("gather starts") >= 3
        assert gathered[0] < events.index("layer 0") < events.index("layer 1") < gathered[-1]


def test_gradients_travel_under_the_last_backward_pass(found: list[dict[str, Any]]) -> None:
    """Of two micro-batches; under ZeRO 1 in bf16. DeepSpeed's own buckets do so by themselves."""
    for of_rank in found:
        events = of_rank["exchange of ZeRO 1 bf16"]["late"]["events"]
        last_pass = [at for at, event in enumerate(events) if event == "layer 0"][1]
        backward = [at for at, event in enumerate(events) if event.startswith("the first")]
        reduced = [at for at, event in enumerate(events) if event == "reduction starts"]
        assert last_pass < reduced[0]
        assert sum(at < backward[1] for at in reduced) >= len(reduced) - 2 > 0
        # The next step's gathers begin once the gradient is whole.
        assert max(reduced) < events.index("gather starts")
