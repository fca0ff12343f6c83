"""A run that stops and goes on is the run that never stopped, under the same or another layout."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.runs import Run, launch, train_runs
from tests.tolerance import NETWORK

HALF, WHOLE = 6, 12

BASE = (
    "logging.every=1",
    "training.valid_every=6",
    f"checkpoint.every={HALF}",
    "model.hidden_size=32",
    "model.dropout=0.1",
    # Held by the first and by the last stage, written once.
    "model.tied_embedding=true",
    *("model.norm=rmsnorm", "model.activation=swiglu", "model.num_kv_heads=2"),
    "optimizer.name=muon",
    "optimizer.schedule=cosine",
    "training.anneal_steps=8",
)
TENSOR = ("parallel.tensor=2", "parallel.sequence_parallel=true")
BF16 = ("training.precision=bf16",)
OTHERS = {
    "ZeRO 3": (2, ("parallel.zero_stage=3",)),
    "PP2": (2, ("parallel.pipeline=2",)),
    "one process": (1, ()),
}


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """An uninterrupted run, and runs that went on from copies of its checkpoint half-way."""
    folder = tmp_path_factory.mktemp("resume")
    base = (f"data.path={dataset}", *BASE, f"training.steps={WHOLE}")

    def run(name: str, *overrides: str) -> Run:
        return Run(folder / name, (*base, *overrides))

    whole, whole_bf16 = run("whole", *TENSOR), run("whole bf16", *TENSOR, *BF16)
    train_runs(2, [whole, whole_bf16], folder / "whole.json")
    resumed = {
        "same": (2, run("same", *TENSOR)),
        "same bf16": (2, run("same bf16", *TENSOR, *BF16)),
    }
    resumed |= {name: (size, run(name, *layout)) for name, (size, layout) in OTHERS.items()}
    for name, (_, copy) in resumed.items():
        source = whole_bf16 if name.endswith("bf16") else whole
        shutil.copytree(source.run_dir, copy.run_dir)
        # As if the processes had been killed after the checkpoint half-way, some lines later.
        shutil.rmtree(copy.run_dir / f"checkpoints/step-{WHOLE}")
        (copy.run_dir / "checkpoints/latest").write_text(f"step-{HALF}\n")
    for size in (2, 1):
        of_size = [copy for processes, copy in resumed.values() if processes == size]
        train_runs(size, of_size, folder / f"resumed-{size}.json")
    made = {name: copy for name, (_, copy) in resumed.items()}
    return made | {"whole": whole, "whole bf16": whole_bf16}


@pytest.mark.parametrize("suffix", ["", " bf16"])
def test_the_same_layout_resumes_bit_for_bit(runs: dict[str, Run], suffix: str) -> None:
    timing = {"tokens_per_second", "step_ms", "mfu", "memory_bytes"}

    def numbers(run: Run) -> list[dict[str, float]]:
        return [{k: v for k, v in line.items() if k not in timing} for line in run.lines()]

    assert numbers(runs[f"same{suffix}"]) == numbers(runs[f"whole{suffix}"])
    assert [line["step"] for line in runs["whole"].lines() if "loss" in line] == list(
        range(1, WHOLE + 1)
    )


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_another_layout_resumes_with_the_same_losses(runs: dict[str, Run], name: str) -> None:
    for key in ("loss", "grad_norm", "valid_nats_per_token"):
        expected = runs["whole"].series(key)
        assert runs[name].series(key) == pytest.approx(expected, rel=NETWORK), key


def test_a_finished_run_started_again_says_so_and_keeps_its_checkpoint(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    run = runs["one process"]
    before = (run.run_dir / "metrics.jsonl").read_text()
    output = launch(
        1,
        [
            "-m",
            "sedd_scale",
            "train",
            "configs/runs/tiny.yaml",
            *("--run-dir", str(run.run_dir)),
            *run.overrides,
        ],
    )
    assert f"resumed {run.run_dir}/checkpoints/step-{WHOLE} at step {WHOLE}" in output
    assert (run.run_dir / "metrics.jsonl").read_text() == before
