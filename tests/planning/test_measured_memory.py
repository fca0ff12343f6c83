"""Predicted bytes of weights, gradients and optimizer against what real engines hold."""

import json
from pathlib import Path

import pytest

from sedd_scale.config import load_config
from sedd_scale.planning import plan
from tests.distributed.runs import launch
from tests.repository import ROOT

WORKER = Path(__file__).with_name("memory_worker.py")
VOCAB_SIZE, BLOCK_LENGTH = 2001, 16
SIZES = (
    "model.hidden_size=256",
    "model.num_layers=4",
    "model.cond_dim=128",
    f"model.vocab_size={VOCAB_SIZE}",
    f"data.block_length={BLOCK_LENGTH}",
    "training.global_batch=4",
    "training.micro_batch=1",
)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "fp32 alone": (1, ["training.precision=fp32"]),
    "bf16 alone": (1, ["training.precision=bf16"]),
    **{
        f"{precision} zero{stage} data2": (
            2,
            [f"training.precision={precision}", f"parallel.zero_stage={stage}"],
        )
        for precision in ("fp32", "bf16")
        for stage in (1, 2, 3)
    },
    "fp32 zero2 tensor2": (
        2,
        ["training.precision=fp32", "parallel.zero_stage=2", "parallel.tensor=2"],
    ),
    "bf16 tensor2 sequence": (
        2,
        ["training.precision=bf16", "parallel.tensor=2", "parallel.sequence_parallel=true"],
    ),
    "fp32 pipeline2": (2, ["training.precision=fp32", "parallel.pipeline=2"]),
    "fp32 pipeline2 shared heads, tied": (
        2,
        [
            *("training.precision=fp32", "parallel.pipeline=2", "model.tied_embedding=true"),
            *("model.num_kv_heads=2", "model.activation=swiglu", "model.norm=rmsnorm"),
            "optimizer.name=muon",
        ],
    ),
    "bf16 pipeline2 uniform": (
        2,
        ["training.precision=bf16", "parallel.pipeline=2", "graph.name=uniform"],
    ),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of reports a layout, from one launch for each number of processes."""
    folder = tmp_path_factory.mktemp("reports")
    for num_processes in (1, 2):
        jobs = []
        for name, (processes, overrides) in LAYOUTS.items():
            if processes == num_processes:
                (folder / name).mkdir()
                jobs.append({"overrides": [*SIZES, *overrides], "reports": str(folder / name)})
        jobs_file = folder / f"jobs-{num_processes}.json"
        jobs_file.write_text(json.dumps(jobs))
        launch(num_processes, [str(WORKER), str(jobs_file)])
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_prediction_is_within_ten_percent_of_what_is_measured(name: str, reports: Path) -> None:
    num_processes, overrides = LAYOUTS[name]
    config = load_config(ROOT / "configs/runs/tiny.yaml", [*SIZES, *overrides])
    planned = plan(config, num_processes, vocab_size=VOCAB_SIZE, block_length=BLOCK_LENGTH)
    measured = [
        json.loads((reports / name / f"{r}.json").read_text()) for r in range(num_processes)
    ]
    for stage, memory in enumerate(planned.stages):
        ranks = [report for report in measured if report["stage"] == stage]
        for key in ("weights", "gradients", "optimizer"):
            predicted, found = getattr(memory.states, key), max(rank[key] for rank in ranks)
            print(f"{name:24} stage {stage} {key:10} {predicted:>12,} {found:>12,}")
            assert predicted == pytest.approx(found, rel=0.1), (stage, key)
        held = sum(max(rank[key] for rank in ranks) for key in ("weights", "optimizer"))
        other = max(rank["other"] for rank in ranks)
        print(f"{name:24} stage {stage} other {other:,} buckets {ranks[0]['buckets']:,}")
        # Nothing of the size of the model is left out.
        assert other < 0.1 * held
