"""Padded blocks: every layout trains the mean over the text of the global batch, and no other."""

from pathlib import Path

import numpy as np
import pytest

from sedd_scale.config import load_config
from sedd_scale.data.corpus import Corpus
from sedd_scale.data.padding import counted_positions
from tests.datasets import dataset_of_files
from tests.distributed.plain_loop import plain_training
from tests.distributed.runs import Run, train_runs
from tests.repository import ROOT
from tests.tolerance import NETWORK

STEPS = 4
BASE = (
    f"training.steps={STEPS}",
    "training.global_batch=8",
    "logging.every=1",
    f"training.valid_every={STEPS}",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.cond_dim=40",
    "model.zero_init=false",
)
LAYOUTS = {
    "one process, one micro-batch": (1, ("training.micro_batch=8",)),
    "two replicas": (2, ("training.micro_batch=2",)),
    "two stages": (2, ("training.micro_batch=1", "parallel.pipeline=2")),
}


@pytest.fixture(scope="module", params=["absorb", "uniform"])
def graph(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 20 to 70 bytes in blocks of 72: a third of all positions is padding."""
    rng = np.random.default_rng(0)
    texts = (
        "x" + "".join(rng.choice(list("abcdefgh "), size=rng.integers(20, 70))) for _ in range(120)
    )
    folder = tmp_path_factory.mktemp("padded")
    return dataset_of_files(folder, texts, block_length=72, packing="documents")


@pytest.fixture(scope="module")
def runs(padded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """Each layout under each graph: two launches."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        (name, graph): Run(
            folder / f"{name}, {graph}",
            (f"data.path={padded}", *BASE, *overrides, f"graph.name={graph}"),
        )
        for name, (_, overrides) in LAYOUTS.items()
        for graph in ("absorb", "uniform")
    }
    for size in (1, 2):
        of_size = [run for (name, _), run in made.items() if LAYOUTS[name][0] == size]
        train_runs(size, of_size, folder / f"jobs-{size}.json")
    return made


def test_loss_is_the_mean_over_text_under_every_layout(
    runs: dict[tuple[str, str], Run], graph: str
) -> None:
    first = runs["one process, one micro-batch", graph]
    plain = plain_training(load_config(ROOT / "configs/runs/tiny.yaml", first.overrides))
    for name in LAYOUTS:
        run = runs[name, graph]
        assert run.series("loss") == pytest.approx(plain.losses, rel=NETWORK), name
        assert run.series("grad_norm") == pytest.approx(plain.grad_norms, rel=NETWORK), name
        bound = run.series("valid_nats_per_token")
        assert bound == pytest.approx(first.series("valid_nats_per_token"), rel=NETWORK), name


def test_tokens_are_those_of_text(runs: dict[tuple[str, str], Run], graph: str) -> None:
    run = runs["one process, one micro-batch", graph]
    config = load_config(ROOT / "configs/runs/tiny.yaml", run.overrides)
    corpus = Corpus(config.data)
    loader = corpus.train_loader(config)
    blocks = [loader.batch(step, range(8)) for step in range(STEPS)]
    text = np.cumsum([counted_positions(block, corpus.eos_id).sum() for block in blocks])
    assert text[-1] < 0.9 * STEPS * 8 * 72, "there has to be padding for this to mean something"
    for name in LAYOUTS:
        lines = [line for line in runs[name, graph].lines() if "loss" in line]
        assert [line["tokens"] for line in lines] == text.tolist(), name
        for line, count in zip(lines, np.diff(text, prepend=0).tolist()):
            assert line["tokens_per_second"] * line["step_ms"] / 1000 == pytest.approx(count)
