"""What the loop refuses before it starts, and the batches it makes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sedd_scale.config import Config, load_config
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.parallel.layout import Layout, initialize_layout
from sedd_scale.tracking.metrics import TIME_KEYS
from sedd_scale.training.batches import TrainBatches, ValidationBatches
from sedd_scale.training.loop import open_dataset, train
from sedd_scale.training.resume import find_resume
from tests.datasets import dataset_of_files, letters
from tests.repository import ROOT

TINY = ROOT / "configs/runs/tiny.yaml"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_of_files(tmp_path_factory.mktemp("dataset"), letters(seed=0), block_length=16)


def tiny(dataset: Path, *overrides: str) -> Config:
    return load_config(
        TINY,
        [
            f"data.path={dataset}",
            "training.steps=2",
            "training.valid_every=0",
            "checkpoint.every=2",
            "model.hidden_size=16",
            "model.num_layers=1",
            "model.num_heads=2",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train(tiny(dataset), run_dir)
    return run_dir


def test_a_run_directory_holds_what_describes_the_run(finished: Path, dataset: Path) -> None:
    held = load_config(finished / "config.yaml")
    assert held == open_dataset(tiny(dataset))[0]
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "lock"}
    assert (finished / "checkpoints/latest").read_text() == "step-2\n"
    assert (finished / "checkpoints/step-2/tokenizer/tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("model.vocab_size=300", ConfigError, ["model.vocab_size=300", "257"]),
        ("data.block_length=32", ConfigError, ["data.block_length=32", "16"]),
        ("data.path=/nowhere", DataError, ["/nowhere", "prepare_data"]),
        ("data.path=null", ConfigError, ["data.path"]),
        ("training.global_batch=3", ConfigError, ["training.global_batch=3", "micro_batch"]),
        ("parallel.tensor=2", ConfigError, ["parallel.tensor=2"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    dataset: Path, override: str, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        open_dataset(tiny(dataset, override))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resume_finds_the_run_or_refuses(finished: Path, dataset: Path, tmp_path: Path) -> None:
    def source(*overrides: str, run_dir: Path = finished, data: Path = dataset) -> Path | None:
        config, opened = open_dataset(tiny(data, *overrides))
        return find_resume(config, run_dir, opened)

    assert source() == finished
    assert source(run_dir=tmp_path / "new") is None
    assert source(f"training.resume={finished}", run_dir=tmp_path / "new") is not None
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        source("training.resume=never")
    with pytest.raises(CheckpointError, match=r"training\.seed=0, not 1"):
        source("training.seed=1")
    with pytest.raises(CheckpointError, match=r"training\.global_batch=8, not 4"):
        source("training.global_batch=4")
    with pytest.raises(CheckpointError, match=r"training\.objective=score_entropy, not masked"):
        source("training.objective=masked_cross_entropy")
    for change, message in (
        ("model.num_heads=4", r"model\.num_heads=4 does not fit .*has 2"),
        ("model.rotary_base=5", r"set model\.rotary_base=10000"),
        ("model.scale_by_sigma=false", r"set model\.scale_by_sigma=true"),
    ):
        with pytest.raises(ConfigError, match=message):
            source(change)
    with pytest.raises(CheckpointError, match=r"noise\.name=loglinear, not cosine"):
        source("noise.name=cosine")
    with pytest.raises(CheckpointError, match=r"model\.document_attention=false, not true"):
        source("model.document_attention=true")
    with pytest.raises(ConfigError, match="done 2 steps"):
        source("training.steps=1")
    with pytest.raises(DataError, match="another dataset"):
        source(data=dataset_of_files(tmp_path / "other", letters(seed=1), block_length=16))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        source("training.resume=/nowhere")
    lost = tmp_path / "lost"
    shutil.copytree(finished, lost)
    (lost / "checkpoints/latest").unlink()
    assert source(run_dir=lost) == lost  # `load_newest` finds an older one, or refuses


def test_the_command_reports_a_user_error_in_one_line(tmp_path: Path) -> None:
    finished = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "sedd_scale",
                "train",
                str(TINY),
                "--run-dir",
                str(tmp_path / "run"),
            ),
            "training.stepz=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "training.stepz" in finished.stderr
    assert "training.steps" in finished.stderr
    assert not (tmp_path / "run").exists()


def layout(data: int, data_rank: int) -> Layout:
    return Layout(
        tensor=1,
        pipeline=1,
        data=data,
        tensor_rank=0,
        pipeline_rank=0,
        data_rank=data_rank,
        rank=data_rank,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("graph_name", ["absorb", "uniform"])
def test_replicas_share_the_same_global_batch(dataset: Path, graph_name: str) -> None:
    config, opened = open_dataset(tiny(dataset, f"graph.name={graph_name}"))

    def inputs(data: int, micro_batch: int) -> list[torch.Tensor]:
        split = config.override(f"training.micro_batch={micro_batch}")
        batches = [
            batch.inputs
            for rank in range(data)
            for batch in TrainBatches(opened, split, layout(data, rank)).of_step(5).micro_batches
        ]
        return [torch.cat(part) for part in zip(*batches, strict=True)]

    whole = inputs(1, 8)
    for data, micro_batch in ((1, 1), (2, 2), (4, 1)):
        for part, expected in zip(inputs(data, micro_batch), whole, strict=True):
            assert torch.equal(part, expected)


def test_validation_counts_each_block_once_under_any_split(dataset: Path) -> None:
    config, opened = open_dataset(tiny(dataset, "training.valid_blocks=13"))

    def bound(data: int) -> tuple[float, float]:
        nats = []
        for rank in range(data):
            batches = ValidationBatches(opened, config, layout(data, rank))
            # Any function of the batch stands for the loss here.
            nats.append(
                torch.cat(
                    [b.inputs[0].double().sum(1) * b.inputs[1] for b in batches.micro_batches]
                )
            )
        return batches.bound(nats)

    assert len({bound(data) for data in (1, 2, 4)}) == 1


def test_validation_loss_by_time_is_that_of_the_blocks_at_those_times(dataset: Path) -> None:
    config, opened = open_dataset(tiny(dataset, "training.valid_blocks=30"))

    def by_time(data: int) -> dict[str, float]:
        nats = []
        for rank in range(data):
            batches = ValidationBatches(opened, config, layout(data, rank))
            sigma_B = torch.cat([batch.inputs[1] for batch in batches.micro_batches]).double()
            # In the place of the loss: t nats a token, from the noise that the network is told.
            nats.append(-torch.expm1(-sigma_B) / (1 - config.noise.eps) * opened.block_length)
        batches.bound(nats)
        return batches.metrics()

    found = by_time(1)
    assert found == by_time(2)
    assert list(found) == [f"valid_loss_t{tenth}" for tenth in range(10)]
    for tenth, value in enumerate(found.values()):
        assert tenth / 10 - 1e-4 <= value <= (tenth + 1) / 10 + 1e-4
    assert tuple(found) == TIME_KEYS


def test_layout_of_one_process() -> None:
    assert initialize_layout().world_size == 1
