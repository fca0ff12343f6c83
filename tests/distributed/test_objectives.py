"""Every objective trains the same run under tensor, pipeline and data parallelism.

A few layouts and steps: the table of `test_layouts` shows the rest of what layouts share. The
first losses of one process are those of the untrained network, evaluated without any engine.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from sedd_scale.config import load_config
from sedd_scale.data.corpus import Corpus
from sedd_scale.diffusion.corruption import Draw
from sedd_scale.diffusion.objectives import make_objective
from sedd_scale.model.attention import document_starts
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from tests.distributed.runs import Run, train_runs
from tests.distributed.test_layouts import relative, weight_difference, weights
from tests.repository import ROOT
from tests.tolerance import NETWORK

STEPS = 4
BASE = (
    f"training.steps={STEPS}",
    "logging.every=1",
    f"training.valid_every={STEPS}",
    f"checkpoint.every={STEPS}",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.zero_init=false",
    "optimizer.clip=0.5",
)
OBJECTIVES = {
    "autoregressive": ("training.objective=autoregressive", "model.document_attention=true"),
    "masked_cross_entropy": ("training.objective=masked_cross_entropy",),
    "d3pm_absorb": ("training.objective=d3pm_absorb", "training.d3pm_steps=50"),
    "mean": ("model.parametrisation=mean",),
    "autoregressive shift": (
        *("training.objective=autoregressive", "training.shift=true"),
        "model.document_attention=true",
    ),
    "shift": ("training.shift=true", "model.parametrisation=mean"),
    "annealed": ("training.anneal_steps=2",),
    "annealed documents": ("training.anneal_steps=9", "model.document_attention=true"),
}
LAYOUTS = {
    "one process": (1, ()),
    "TP2 SP": (2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "PP2": (2, ("parallel.pipeline=2",)),
    "DP2 ZeRO 3": (2, ("parallel.zero_stage=3",)),
}
# They differ from masked_cross_entropy by what is made on the host, or by nothing but names.
FEW_LAYOUTS = dict.fromkeys(("d3pm_absorb", "mean"), ("one process", "TP2 SP"))
for name in ("shift", "annealed", "annealed documents"):
    FEW_LAYOUTS[name] = ("one process", "TP2 SP", "PP2")


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    folder = tmp_path_factory.mktemp("objectives")
    made = {
        (objective, layout): Run(
            folder / f"{objective} {layout}",
            (f"data.path={dataset}", *BASE, *changes, *of_objective),
        )
        for objective, of_objective in OBJECTIVES.items()
        for layout, (_, changes) in LAYOUTS.items()
        if layout in FEW_LAYOUTS.get(objective, LAYOUTS)
    }
    for size in (1, 2):
        of_size = [run for (_, layout), run in made.items() if LAYOUTS[layout][0] == size]
        train_runs(size, of_size, folder / f"jobs-{size}.json")
    return made


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layouts_agree(runs: dict[tuple[str, str], Run], objective: str) -> None:
    single = runs[objective, "one process"]
    assert len(single.series("loss")) == STEPS
    assert max(single.series("grad_norm")) > 0.5, "clipping must be active"
    for layout in FEW_LAYOUTS.get(objective, LAYOUTS):
        run = runs[objective, layout]
        for key in ("loss", "grad_norm", "valid_nats_per_token"):
            assert relative(run.series(key), single.series(key)) < NETWORK, (layout, key)
        assert weight_difference(weights(run), weights(single)) < NETWORK, layout


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "annealed" not in name])
def test_the_first_loss_is_the_definition_s(
    runs: dict[tuple[str, str], Run], dataset: Path, objective: str
) -> None:
    """Weight times cross-entropy of every row, from whole logits."""
    run = runs[objective, "one process"]
    config = load_config(ROOT / "configs/runs/tiny.yaml", run.overrides)
    corpus, made = Corpus(config.data), make_objective(config)
    model = ScoreModel(
        config, corpus.vocab_size, initialize_layout(), block_length=32, tokenizer=corpus
    )
    loader = corpus.train_loader(config)
    batch = config.training.global_batch
    sample_ids = loader.sample_ids(0, np.arange(batch))
    shown = made.corrupt(
        torch.from_numpy(loader.read_samples(sample_ids)),
        Draw(config.training.seed, 0, sample_ids, global_batch=batch),
        graph=model.graph,
        schedule=model.schedule,
        t_min=config.noise.t_min,
    )
    rows = torch.arange(shown.noisy_BL.numel())
    ends_BE = model.document_ends(shown.clean_BL)
    logits = model.logits(shown.noisy_BL, shown.sigma_B.float(), rows, ends_BE)
    counts_BL = torch.ones(shown.clean_BL.shape, dtype=torch.float64)
    if config.training.shift and made.causal:
        logits = logits.roll(1, dims=0)  # of the row before; a document's first has no loss
        counts_BL = 1.0 - document_starts(shown.clean_BL.shape, ends_BE).double()
    nats_R = torch.nn.functional.cross_entropy(
        logits[:, : corpus.vocab_size].double(), shown.clean_BL.flatten(), reduction="none"
    )
    weight_BL = shown.noise_B3[:, 2:].expand_as(shown.clean_BL)
    positions = counts_BL.sum()
    if not made.causal:
        counts_BL = (shown.noisy_BL == model.graph.mask_id).double()
    expected = float((weight_BL * counts_BL).flatten() @ nats_R) / float(positions)
    assert run.series("loss")[0] == pytest.approx(expected, rel=NETWORK)
