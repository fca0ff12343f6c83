"""A run that starts from a finished model begins as that model, in any format and layout."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sedd_scale import load_pretrained
from sedd_scale.config import Config, load_config
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.convert import convert
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.initial_weights import check_same_model
from sedd_scale.interop.model_source import ModelSource
from sedd_scale.interop.native import write_native_run
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning.model_states import STATE_KEYS
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from sedd_scale.training.batches import TrainBatches
from sedd_scale.training.loop import open_dataset, train
from tests.datasets import dataset_of_files, letters
from tests.distributed.runs import Run, train_runs
from tests.repository import ROOT
from tests.tolerance import NETWORK

LENGTH, TOKENS, FEW_TOKENS = 16, 257, 200
BASE = (
    "training.steps=2",
    "training.valid_every=0",
    "logging.every=1",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.cond_dim=8",
)
# Two processes each: from which of the runs of one process they must not differ, overrides.
LAYOUTS = {
    "TP2": ("grown", ("parallel.tensor=2",)),
    "PP2": ("native", ("parallel.pipeline=2",)),
    "ZeRO 1": ("grown", ()),
    "ZeRO 2": ("native", ("parallel.zero_stage=2",)),
    "ZeRO 3": ("grown", ("parallel.zero_stage=3",)),
}
GRAPHS = {
    "absorb": ("graph.name=absorb",),
    "absorb unscaled": ("graph.name=absorb", "model.scale_by_sigma=false"),
    "uniform": ("graph.name=uniform", "noise.name=geometric"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random letters as bytes: all ids but EOS are below `FEW_TOKENS`."""
    folder = tmp_path_factory.mktemp("dataset")
    return dataset_of_files(folder, letters(), block_length=LENGTH)


class Averaged(ModelSource):
    """A trained run's state: averages that are the model's weights, masters that are not."""

    def __init__(self, model: ScoreModel, tokenizer_directory: Path | None = None) -> None:
        super().__init__(model, tokenizer_directory)
        self.holds = frozenset({"ema", "master"})

    def _read(self, name: str, key: str) -> torch.Tensor:
        return super()._read(name, key) * (1.0 if key == "ema" else 0.5)


def config_of(*overrides: str) -> Config:
    return load_config(ROOT / "configs/runs/tiny.yaml", [*BASE, *overrides])


def source_model(num_tokens: int, *overrides: str) -> ScoreModel:
    """A random network that no run of this file would draw."""
    config = config_of("model.zero_init=false", "training.seed=5", *overrides)
    return ScoreModel(config, num_tokens, initialize_layout(), block_length=LENGTH)


@pytest.fixture(scope="module")
def sources(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every format, and one of fewer tokens."""
    folder = tmp_path_factory.mktemp("sources")
    BytesTokenizer().save(folder / "tokenizer")
    made = {name: folder / name for name in ("native", "sedd-hf", "few")}
    made |= {"sedd-train": folder / "theirs.pth", "mdlm": folder / "mdlm.safetensors"}
    write_native_run(Averaged(source_model(TOKENS), folder / "tokenizer"), made["native"])
    convert("native", "sedd-hf", made["native"], made["sedd-hf"])
    convert("native", "sedd-train", made["native"], made["sedd-train"])
    published = load_file(made["sedd-hf"] / "model.safetensors")
    save_file({f"backbone.{name}": value for name, value in published.items()}, made["mdlm"])
    write_native_run(Averaged(source_model(FEW_TOKENS)), made["few"])
    return made


@pytest.fixture(scope="module")
def single(
    dataset: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """Runs of one process: from every format, and grown."""
    folder = tmp_path_factory.mktemp("single")
    made = {
        name: Run(folder / name, (f"data.path={dataset}", *BASE, f"model.init_from={path}"))
        for name, path in sources.items()
        if name in ("native", "sedd-hf", "sedd-train")
    }
    made["mdlm"] = Run(
        folder / "mdlm",
        (
            f"data.path={dataset}",
            *BASE,
            f"model.init_from={sources['mdlm']}",
            "model.time_conditioning=false",
            "training.objective=masked_cross_entropy",
        ),
    )
    made["grown"] = Run(folder / "grown", grown(dataset, sources["few"]))
    for run in made.values():
        train(load_config(ROOT / "configs/runs/tiny.yaml", run.overrides), run.run_dir)
    return made


def grown(dataset: Path, source: Path, *overrides: str) -> tuple[str, ...]:
    return (
        *(f"data.path={dataset}", *BASE, f"model.init_from={source}"),
        *("model.grow_vocab=true", "model.zero_init=false", *overrides),
    )


def first_loss(model: ScoreModel, run: Run) -> float:
    """The model's own loss on the first batch of a run."""
    config = load_config(ROOT / "configs/runs/tiny.yaml", run.overrides)
    config, corpus = open_dataset(config)
    batches = TrainBatches(corpus, config, model.layout)
    losses = [model.network(*batch) for batch in batches.of_step(0).micro_batches]
    return float(torch.stack(losses).mean().detach())


@pytest.mark.parametrize("name", ["native", "sedd-hf", "sedd-train"])
def test_a_run_begins_as_the_model_it_starts_from(
    sources: dict[str, Path], single: dict[str, Run], name: str
) -> None:
    model = load_pretrained(sources["native"], weights="ema")
    expected = first_loss(model, single[name])
    assert single[name].series("loss")[0] == pytest.approx(expected, rel=NETWORK)
    assert single[name].series("loss") == single["native"].series("loss")
    assert [line["step"] for line in single[name].lines() if "loss" in line] == [1, 2]


def test_a_run_begins_as_mdlm_without_time(
    sources: dict[str, Path], single: dict[str, Run]
) -> None:
    expected = first_loss(load_pretrained(sources["mdlm"]), single["mdlm"])
    assert single["mdlm"].series("loss")[0] == pytest.approx(expected, rel=NETWORK)
    assert expected != pytest.approx(single["native"].series("loss")[0], rel=1e-3)


def test_every_layout_begins_alike(single: dict[str, Run], tmp_path: Path) -> None:
    runs = {
        name: Run(tmp_path / name, (*single[kind].overrides, *layout))
        for name, (kind, layout) in LAYOUTS.items()
    }
    train_runs(2, list(runs.values()), tmp_path / "jobs.json")
    for name, (kind, _) in LAYOUTS.items():
        for key in ("loss", "grad_norm"):
            expected = single[kind].series(key)
            assert runs[name].series(key) == pytest.approx(expected, rel=NETWORK), (name, key)


def test_a_resumed_run_needs_its_source_no_more(dataset: Path, sources: dict[str, Path]) -> None:
    copy = dataset.parent / "moved"
    shutil.copytree(sources["native"], copy)
    overrides = (f"data.path={dataset}", f"model.init_from={copy}", "checkpoint.every=1")
    run = Run(dataset.parent / "run", overrides)
    train(config_of(*overrides, "training.steps=1"), run.run_dir)
    shutil.rmtree(copy)
    train(config_of(*overrides), run.run_dir)
    assert [line["step"] for line in run.lines() if "loss" in line] == [1, 2]
    with pytest.raises(ConfigError, match=f"model.init_from={copy} does not exist"):
        train(config_of(*overrides), dataset.parent / "another")


@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_a_grown_vocabulary_leaves_the_scores_of_old_tokens_as_they_were(
    dataset: Path, sources: dict[str, Path], graph: str, tmp_path: Path
) -> None:
    source = source_model(FEW_TOKENS, *GRAPHS[graph])
    write_native_run(Averaged(source), tmp_path / "source")
    overrides = grown(dataset, tmp_path / "source", *GRAPHS[graph])
    still = ("training.steps=1", "optimizer.lr=1e-30")  # moves no number of float32
    train(config_of(*overrides, *still), tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(FEW_TOKENS, (3, LENGTH), generator=generator)
    sigma_B = torch.tensor([0.1, 0.7, 3.0])
    is_masked_BL = torch.rand(tokens_BL.shape, generator=generator) < 0.5
    for weights in ("ema", "master"):
        model = load_pretrained(tmp_path / "run", weights=weights)
        assert model.graph.num_tokens == TOKENS
        before_BL, after_BL = tokens_BL, tokens_BL
        if source.graph.mask_id is not None:
            before_BL = tokens_BL.masked_fill(is_masked_BL, source.graph.mask_id)
            after_BL = tokens_BL.masked_fill(is_masked_BL, model.graph.mask_id)
        before = source.log_score(before_BL, sigma_B)[..., :FEW_TOKENS]
        after = model.log_score(after_BL, sigma_B)[..., :FEW_TOKENS]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        # New rows are those of a fresh model of this size.
        fresh = ScoreModel(model.config, TOKENS, model.layout)
        new = slice(FEW_TOKENS, TOKENS)
        for name in ("embedding.tokens.weight", "head.linear.weight", "head.linear.bias"):
            assert torch.equal(weight(model, name)[new], weight(fresh, name)[new]), name


def weight(model: ScoreModel, name: str) -> torch.Tensor:
    (found,) = (p for p in logical_parameters(model.network, model.layout) if p.name == name)
    return found.parameter.detach()


REFUSED = {
    "native model.num_layers=3": (
        "model.num_layers=3 does not fit model.init_from={native}, which has 2 "
        "(blocks.2.norm1.weight is missing there and [32] here): set model.num_layers=2"
    ),
    "native model.hidden_size=64": "embedding.tokens.weight is [258, 32] there and [258, 64] here",
    "sedd-hf model.num_heads=4": "model.num_heads=4 does not fit model.init_from={sedd-hf}, which "
    "has 2: set model.num_heads=2",
    "native graph.name=uniform": "graph.name=uniform does not fit model.init_from={native}, which "
    "has absorb (embedding.tokens.weight is [258, 32] there and [257, 32] here): set "
    "graph.name=absorb",
    "native model.rotary_base=9": "model.rotary_base=9.0 does not fit model.init_from={native}, "
    "which has 10000.0: set model.rotary_base=10000.0",
    "native model.scale_by_sigma=false": "set model.scale_by_sigma=true",
    "mdlm": "model.time_conditioning=true does not fit model.init_from={mdlm}, which has false: "
    "set model.time_conditioning=false",
    "few": "model.vocab_size=257, the dataset's, does not fit model.init_from={few}, which has 200 "
    "tokens (embedding.tokens.weight is [201, 32] there and [258, 32] here): prepare the data with "
    "the tokenizer it was trained with, or set model.grow_vocab=true to add 57 tokens behind its "
    "own",
    "native training.objective=autoregressive": "training.objective=autoregressive does not fit "
    "model.init_from={native}, a network of score_entropy: its attention is another; set "
    "training.objective=score_entropy",
    "native training.resume={native}": "starts a new run and training.resume=",
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused_before_the_run_begins(
    dataset: Path, sources: dict[str, Path], case: str, tmp_path: Path
) -> None:
    name, *changes = case.split()
    named = {key: str(path) for key, path in sources.items()}
    changes = [change.format(**named) for change in changes]
    overrides = (f"data.path={dataset}", f"model.init_from={sources[name]}", *changes)
    with pytest.raises(ConfigError) as caught:
        train(config_of(*overrides), tmp_path / "run")
    assert REFUSED[case].format(**named) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_network_of_cross_entropy_starts_either_parametrisation() -> None:
    """Its outputs are logits of clean tokens; those of score entropy are what its key says."""
    size = f"model.vocab_size={TOKENS}"
    mean, score = (config_of(size, f"model.parametrisation={kind}") for kind in ("mean", "score"))
    entropy = config_of(size, "training.objective=masked_cross_entropy")
    for config in (mean, score):
        check_same_model(config, entropy, "the source")
        check_same_model(entropy, config, "the source")
    with pytest.raises(ConfigError, match=r"set model\.parametrisation=score"):
        check_same_model(mean, score, "the source")


def test_other_tokens_are_refused(dataset: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    letters = ScoreModel(config_of(), 27, initialize_layout(), block_length=LENGTH)
    Text8Tokenizer().save(tmp_path / "letters")
    write_native_run(ModelSource(letters, tmp_path / "letters"), tmp_path / "source")
    overrides = grown(dataset, tmp_path / "source")
    with pytest.raises(ConfigError, match=r"another tokenizer .*is token 0 there and 256 here"):
        train(config_of(*overrides), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"grow_vocab=true has no effect"):
        config_of("model.grow_vocab=true").validate()


def test_a_damaged_source_is_refused(
    dataset: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(sources["native"], tmp_path / "source")
    (data,) = (tmp_path / "source").glob("checkpoints/step-0/*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        train(
            config_of(f"data.path={dataset}", f"model.init_from={tmp_path / 'source'}"),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_authors_program_goes_on(dataset: Path, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", (f"data.path={dataset}", "checkpoint.every=1"))
    train(config_of(*whole.overrides, "training.steps=4"), whole.run_dir)
    # The same training, passed through their format half-way: what it says is all that is needed.
    half = whole.run_dir / "checkpoints/step-2"
    convert("native", "sedd-train", half, tmp_path / "checkpoint.pth")
    theirs = Run(tmp_path / "theirs", whole.overrides)
    short = Assumptions(block_length=LENGTH)
    convert("sedd-train", "native", tmp_path / "checkpoint.pth", theirs.run_dir, assumptions=short)
    train(config_of(*theirs.overrides, "training.steps=4"), theirs.run_dir)
    assert theirs.series("loss") == whole.series("loss")[2:]
    ends = [open_checkpoint(run.run_dir) for run in (whole, theirs)]
    for name in ends[0].shapes:
        for key in STATE_KEYS:
            assert torch.equal(*(end.read(name, key) for end in ends)), (name, key)

    for changes, words in (
        (("model.num_heads=4",), "model.num_heads=4 does not fit"),
        (("training.steps=1",), "has done 2 steps"),
    ):
        resumed = f"training.resume={theirs.run_dir / 'checkpoints/step-2'}"
        with pytest.raises(ConfigError, match=words):
            train(config_of(*theirs.overrides, resumed, *changes), tmp_path / "new")
    convert("native", "native", half, tmp_path / "weights", weights="ema")
    with pytest.raises(CheckpointError, match=r"begin a new one, with model\.init_from="):
        train(config_of(*theirs.overrides), tmp_path / "weights")
