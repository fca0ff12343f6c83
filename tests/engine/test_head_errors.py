"""A step that is not finite says which rank, stage and layer, and at what step, on every rank."""

import json
from pathlib import Path

import pytest

from tests.distributed.runs import launch

WORKER = Path(__file__).with_name("failure_worker.py")
WEIGHT = "weight blocks.1.mlp.linear_fc1.weight"
HIDDEN = "hidden states that blocks.1 makes"
OVERFLOW = "e^u is too large for float32"
FP32, BF16 = "training.precision=fp32", "training.precision=bf16"

# (number of processes, what is planted, overrides, what the message must say).
CASES = [
    (1, "nan_weight", (FP32,), ("loss nan", "rank 0, pipeline stage 0", WEIGHT)),
    (1, "nan_weight", (BF16,), ("loss nan", "rank 0", WEIGHT)),
    (1, "nan_weight", (BF16, "parallel.zero_stage=2"), ("loss nan", "rank 0", WEIGHT)),
    (1, "nan_weight", (FP32, "parallel.zero_stage=3"), ("loss nan", "rank 0", WEIGHT)),
    (1, "huge_weights", (FP32,), ("rank 0, pipeline stage 0", HIDDEN)),
    (1, "huge_logits", (FP32,), ("loss inf", "rank 0, pipeline stage 0", OVERFLOW)),
    (1, "huge_logits", (BF16,), ("loss inf", OVERFLOW)),
    (1, "huge_logits", (FP32, "graph.name=uniform"), ("loss inf", OVERFLOW)),
    (2, "nan_weight", (FP32, "parallel.tensor=2"), ("rank 1, pipeline stage 0", WEIGHT)),
    (2, "nan_weight", (FP32, "parallel.pipeline=2"), ("rank 1, pipeline stage 1", WEIGHT)),
    (2, "nan_weight", (BF16, "parallel.zero_stage=3"), ("rank 1, pipeline stage 0", WEIGHT)),
    (2, "huge_weights", (FP32, "parallel.pipeline=2"), ("rank 1, pipeline stage 1", HIDDEN)),
    (2, "huge_logits", (FP32, "parallel.tensor=2"), ("loss inf", OVERFLOW)),
    (1, "stray_weight", (BF16,), ("loss nan", "a working weight was not its master's")),
]


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What each rank was told, case by case; one launch for each number of processes."""
    folder = tmp_path_factory.mktemp("failures")
    told: dict[int, list[str]] = {}
    for num_processes in (1, 2):
        numbered = [(index, case) for index, case in enumerate(CASES) if case[0] == num_processes]
        jobs = [{"plant": plant, "overrides": list(keys)} for _, (_, plant, keys, _) in numbered]
        jobs_file = folder / f"jobs-{num_processes}.json"
        jobs_file.write_text(json.dumps(jobs))
        launch(num_processes, [str(WORKER), str(jobs_file)])
        of_ranks = [
            json.loads(Path(f"{jobs_file}.{rank}").read_text()) for rank in range(num_processes)
        ]
        for (index, _), of_case in zip(numbered, zip(*of_ranks)):
            told[index] = list(of_case)
    return [told[index] for index in range(len(CASES))]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_step_that_is_not_finite_names_what_was_first(
    index: int, messages: list[list[str]]
) -> None:
    num_processes, _, _, words = CASES[index]
    assert len(messages[index]) == num_processes
    assert len(set(messages[index])) == 1, "the ranks disagree"
    message = messages[index][0]
    assert message.startswith("step 2 has ") and "\n" not in message
    for word in words:
        assert word in message
