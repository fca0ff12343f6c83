"""The offset of an autoregressive model's logits, folded into the head's bias."""

import math
from pathlib import Path

import pytest
import torch

from sedd_scale.config import Config, load_config
from sedd_scale.diffusion.graphs import Absorb
from sedd_scale.diffusion.row_law import LogTotal, row_law
from sedd_scale.diffusion.score_entropy import RowNoise, Statistics
from sedd_scale.errors import ConfigError
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.initial_weights import InitialWeights, open_initial_weights
from sedd_scale.interop.model_source import ModelSource
from sedd_scale.interop.native import write_native_run
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.training.batches import TrainBatches
from sedd_scale.training.calibration import calibrate_head
from sedd_scale.training.loop import build, open_dataset, train
from tests.datasets import dataset_of_files, letters
from tests.distributed.runs import Run, train_runs
from tests.repository import ROOT
from tests.tolerance import NETWORK

TOKENS, LENGTH = 257, 16
TRUNK = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2"),
    *("model.norm=rmsnorm", "model.conditioning=none", "model.time_conditioning=false"),
    *("training.shift=true", "model.dropout=0"),
)
ADAPTED = (
    *("training.steps=2", "training.valid_every=0", "logging.every=1", "checkpoint.every=1"),
    *("training.anneal_steps=4", "model.head_bias=true", "model.calibrate_head=true"),
)
# What scores that nothing is divided by need to know of sigma.
UNSCALED = (
    *("model.scale_by_sigma=false", "model.conditioning=adaln", "model.cond_dim=8"),
    *("model.adaln_gate_init=one", "model.time_conditioning=true"),
)
LAYOUTS = {
    "TP2": ("parallel.tensor=2",),
    "PP2": ("parallel.pipeline=2",),
    "ZeRO 1": (),
    "ZeRO 3": ("parallel.zero_stage=3",),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset_of_files(tmp_path_factory.mktemp("dataset"), letters(), block_length=LENGTH)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive network whose logits lie tens of nats above any log-score."""
    folder = tmp_path_factory.mktemp("source") / "run"
    config = config_of(
        *("training.objective=autoregressive", "model.zero_init=false", "training.seed=5"),
    )
    model = ScoreModel(config, TOKENS, initialize_layout(), block_length=LENGTH)
    with torch.no_grad():
        model.network.head.linear.weight.mul_(5.0)
        model.network.head.linear.bias.add_(20.0)
    write_native_run(ModelSource(model, None), folder)
    return folder


def config_of(*overrides: str) -> Config:
    return load_config(ROOT / "configs/runs/tiny.yaml", [*TRUNK, *overrides])


def adapted(dataset: Path, source: Path, *overrides: str) -> tuple[str, ...]:
    return (f"data.path={dataset}", f"model.init_from={source}", *TRUNK, *ADAPTED, *overrides)


@pytest.mark.parametrize("changes", [(), UNSCALED], ids=["scaled", "unscaled"])
def test_scores_sum_to_what_true_ones_do_on_the_mean(
    dataset: Path, source: Path, changes: tuple[str, ...]
) -> None:
    """Over the masked positions of the first batch, from logits of the whole vocabulary."""
    config, corpus = open_dataset(config_of(*adapted(dataset, source, *changes)))
    weights = open_initial_weights(config, corpus)
    assert weights is not None
    engine = build(config, corpus)
    weights.load_into(engine)
    batches = TrainBatches(corpus, config, engine.layout)
    before = mean_log_total(engine, batches)
    assert abs(before) > 10
    assert calibrate_head(engine, batches) == pytest.approx(-before, abs=1e-4)
    assert mean_log_total(engine, batches) == pytest.approx(0.0, abs=1e-5)
    with engine.fragments.ema_weights():
        assert mean_log_total(engine, batches) == pytest.approx(0.0, abs=1e-5)


def mean_log_total(engine: object, batches: TrainBatches) -> float:
    """The mean of ln(sum of scores) + ln(e^sigma - 1), step by step as the definitions say."""
    network = engine._deepspeed.module.eval()  # type: ignore[attr-defined]
    scaled = batches.config.resolved_scale_by_sigma
    found = []
    for batch in batches.of_step(0).micro_batches:
        hidden_LBH = network.head_input(batch.inputs).detach().flatten(0, 1)
        rows_MH = hidden_LBH[batch.targets.rows_M].double()
        linear = network.head.linear
        logits_MN = (rows_MH @ linear.weight.T.double() + linear.bias)[:, :TOKENS]
        log_expm1_M = batch.targets.noise_B3[batch.targets.sequence_M, 0].expm1().log()
        log_scores_MN = logits_MN
        if scaled:
            log_scores_MN = logits_MN - log_expm1_M[:, None] - math.log(TOKENS)
        found.append(log_scores_MN.logsumexp(1) + log_expm1_M)
    return float(torch.cat(found).detach().mean())


def test_every_layout_begins_alike(dataset: Path, source: Path, tmp_path: Path) -> None:
    """And the first steps are finite, which without it they are not."""
    single = Run(tmp_path / "single", adapted(dataset, source))
    train(load_config(ROOT / "configs/runs/tiny.yaml", single.overrides), single.run_dir)
    losses = single.series("loss")
    assert all(math.isfinite(loss) for loss in losses) and losses[0] < 100
    runs = {
        name: Run(tmp_path / name, (*single.overrides, *layout)) for name, layout in LAYOUTS.items()
    }
    train_runs(2, list(runs.values()), tmp_path / "jobs.json")
    for name, run in runs.items():
        for key in ("loss", "grad_norm"):
            assert run.series(key) == pytest.approx(single.series(key), rel=NETWORK), (name, key)
    bias = open_checkpoint(single.run_dir).read("head.linear.bias", "ema")
    assert float(bias[:TOKENS].mean()) < 1  # what is saved is an ordinary weight


def test_a_row_says_what_its_scores_sum_to() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    sigma = torch.tensor([0.7], dtype=torch.float64)
    noise = RowNoise(sigma, sigma, sigma)
    statistics = Statistics(
        logits.amax(1), (logits - logits.max()).exp().sum(1), logits[:, 0], None
    )
    for scaled in (True, False):
        law = row_law(Absorb(3), scaled=scaled)
        scores = law.log_scores(torch.cat([logits, logits[:, :1]], 1), torch.tensor([3]), sigma)
        wanted = scores[:, :3].logsumexp(1) + sigma.expm1().log()
        torch.testing.assert_close(LogTotal(law).rows(statistics, noise).loss, wanted)


@pytest.mark.parametrize(
    "changes, message",
    [
        (("model.init_from=null",), "calibrate_head=true has no effect with model.init_from=null"),
        (("model.head_bias=false",), "has no effect with model.head_bias=false: .*head_bias=true"),
        (("model.parametrisation=mean",), "has no effect with model.parametrisation=mean"),
        (("graph.name=uniform", "model.parametrisation=score"), "no effect with graph.name=unif"),
        (("training.objective=masked_cross_entropy",), "no effect with training.objective=masked"),
    ],
)
def test_where_it_has_no_effect_it_is_refused(changes: tuple[str, ...], message: str) -> None:
    config = config_of("model.init_from=there", *ADAPTED, *changes)
    with pytest.raises(ConfigError, match=message):
        config.validate()


def test_scores_have_no_offset() -> None:
    config = config_of(f"model.vocab_size={TOKENS}", "model.head_bias=true")
    model = ScoreModel(config, TOKENS, initialize_layout(), block_length=LENGTH)
    with pytest.raises(ConfigError, match=r"calibrate_head=true has no effect with model.init_fr"):
        InitialWeights(ModelSource(model, None), config.override("model.calibrate_head=true"))
