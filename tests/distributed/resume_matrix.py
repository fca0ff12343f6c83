"""Saves under every layout, resumes under every other, and compares the losses that follow.

    PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python -W ignore tests/distributed/resume_matrix.py

For every pair (A, B) of the layouts in test_layouts.py: a run under B goes on from A's checkpoint
half-way, and must have the losses of A, which was not interrupted: bit for bit where B is A, in
float32 and bfloat16, and within 1e-5 otherwise. Each layout trains and saves once; one launch for
each number of processes trains, and one resumes. About 200 resumes, some ten minutes on two cores.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.datasets import dataset_of_files, letters
from tests.distributed.runs import WORKER, Run, launch
from tests.distributed.test_layouts import LAYOUTS

HALF, WHOLE = 10, 20
TOLERANCE = 1e-5
BASE = (
    "logging.every=1",
    "training.valid_every=0",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.cond_dim=40",
    "model.dropout=0.1",
    "model.zero_init=false",
    f"training.steps={WHOLE}",
    "checkpoint.keep=0",
)
PRECISIONS = ("fp32", "bf16")


def difference(found: dict[int, float], expected: dict[int, float]) -> float:
    """Greatest relative difference of the losses after the checkpoint."""
    assert list(found) == list(range(HALF + 1, WHOLE + 1)), list(found)
    return max(abs(loss - expected[step]) / abs(expected[step]) for step, loss in found.items())


def losses(run: Run) -> dict[int, float]:
    """Step by step."""
    return {line["step"]: line["loss"] for line in run.lines() if "loss" in line}


def run_all(runs: dict[int, list[Run]], folder: Path, name: str) -> None:
    """One launch for each number of processes."""
    for size, of_size in sorted(runs.items()):
        begun, jobs = time.monotonic(), folder / f"{name}-{size}.json"
        jobs.write_text(
            json.dumps(
                [
                    {
                        "config": "configs/runs/tiny.yaml",
                        "run_dir": str(run.run_dir),
                        "overrides": list(run.overrides),
                    }
                    for run in of_size
                ]
            )
        )
        launch(size, [str(WORKER), str(jobs)], timeout=7200.0)
        print(
            f"{name}: {len(of_size)} runs on {size} processes in {time.monotonic() - begun:.0f} s",
            flush=True,
        )


def matrix(names: list[str], folder: Path) -> dict[tuple[str, str, str], float]:
    """Differences by (saved under, resumed under, precision)."""
    dataset = dataset_of_files(folder / "data", letters(), block_length=16)

    def overrides(layout: str, precision: str) -> tuple[str, ...]:
        place = (f"data.path={dataset}", f"training.precision={precision}")
        return (*BASE, *place, *LAYOUTS[layout][1])

    saved = {
        (layout, precision): Run(
            folder / _name("saved", layout, precision),
            (*overrides(layout, precision), f"checkpoint.every={HALF}"),
        )
        for layout in names
        for precision in PRECISIONS
    }
    resumed = {
        (before, after, precision): Run(
            folder / _name(before, "to", after, precision),
            (
                *overrides(after, precision),
                f"checkpoint.every={WHOLE}",
                f"training.resume={saved[before, precision].run_dir}/checkpoints/step-{HALF}",
            ),
        )
        for precision in PRECISIONS
        for before in names
        for after in names
        if precision == "fp32" or before == after
    }
    for name, runs in (
        ("saved", {(key[0], key): run for key, run in saved.items()}),
        ("resumed", {(key[1], key): run for key, run in resumed.items()}),
    ):
        by_size: dict[int, list[Run]] = {}
        for (layout, _), run in runs.items():
            by_size.setdefault(LAYOUTS[layout][0], []).append(run)
        run_all(by_size, folder, name)
    return {
        key: difference(losses(run), losses(saved[key[0], key[2]])) for key, run in resumed.items()
    }


def _name(*parts: str) -> str:
    return "-".join(parts).replace(" ", "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layouts", nargs="*", help="names of test_layouts.py; none: all")
    names = parser.parse_args().layouts or list(LAYOUTS)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        differences = matrix(names, Path(folder))
    wrong = []
    for (before, after, precision), value in differences.items():
        if value > (0.0 if before == after else TOLERANCE):
            wrong.append(f"{before} -> {after}, {precision}: {value:.1e}")
    across = {key: value for key, value in differences.items() if key[0] != key[1]}
    same = {key: value for key, value in differences.items() if key[0] == key[1]}
    print(f"{len(differences)} resumes in {time.monotonic() - begun:.0f} s")
    print(f"same layout: {len(same)}, greatest difference {max(same.values()):.1e}")
    if across:
        worst = max(across, key=lambda key: across[key])
        print(
            f"another layout: {len(across)}, greatest difference {across[worst]:.1e} "
            f"({worst[0]} -> {worst[1]})"
        )
    print("\n".join(["not as it must be:", *wrong]) if wrong else "all as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
