"""What a configuration trains on: mixtures, their resume, damaged shards, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_scale.config import Config, config_from_dict, load_config
from sedd_scale.data.corpus import Corpus, plan_of
from sedd_scale.data.shards import BadShardError, Dataset
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from tests.data.file_server import serving
from tests.datasets import dataset_of_words

LENGTH = 32


def make(directory: Path, *, seed: int, count: int = 60, **arguments: Any) -> Path:
    chosen = {"block_length": LENGTH, "blocks_per_shard": 40, "valid_fraction": 0.1, **arguments}
    return dataset_of_words(directory / "d", count, seed=seed, **chosen)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("corpus")
    return [make(directory / str(seed), seed=seed) for seed in (1, 2, 3)]


def configure(datasets: list[Path], *overrides: str, weights: Any = (3, 1), **data: Any) -> Config:
    mixture = [{"path": str(path), "weight": w} for path, w in zip(datasets, weights)]
    tree = {
        "data": {"mixture": mixture, **data},
        "training": {"global_batch": 8, "micro_batch": 4, "steps": 500, "valid_every": 50},
    }
    config = config_from_dict(tree).override(*overrides)
    config.validate()
    return config


def test_the_mixture_gives_the_blocks_of_its_datasets(datasets: list[Path]) -> None:
    config = configure(datasets, stages=[{"step": 100, "weights": [0, 1]}])
    corpus = Corpus(config.data)
    corpus.check_use(config)
    loader = corpus.train_loader(config)
    samples = np.arange(100 * 8 + 200)
    places, blocks = loader.places(samples)
    assert np.bincount(places[:800]).tolist() == [600, 200]
    assert set(places[800:]) == {1}
    readers = [Dataset(path).reader("train") for path in datasets[:2]]
    tokens = loader.read_samples(samples)
    for dataset in range(2):
        here = places == dataset
        assert np.array_equal(tokens[here], readers[dataset].read(blocks[here]))
        # Each block once per epoch, counted.
        size = len(readers[dataset])
        mine = blocks[here]
        for epoch in range(len(mine) // size):
            part = mine[epoch * size : (epoch + 1) * size]
            assert np.array_equal(np.sort(part), np.arange(size))
    assert loader.epochs(1000) == [600 / len(readers[0]), 400 / len(readers[1])]
    joint = corpus.valid_reader()
    parts = [Dataset(path).reader("valid") for path in datasets[:2]]
    whole = np.concatenate([part.read(np.arange(len(part))) for part in parts])
    assert np.array_equal(joint.read(np.arange(len(joint))), whole)


def test_token_budgets_are_shares_that_last(datasets: list[Path]) -> None:
    per_step = 8 * LENGTH
    mixture = [{"path": str(datasets[0]), "tokens": 375 * per_step}]
    mixture += [{"path": str(datasets[1]), "tokens": 1.25e2 * per_step}]
    config = configure(datasets).override("data.mixture=null", f"data.mixture={mixture}")
    config.validate()
    assert plan_of(config, LENGTH).given(500 * 8).tolist() == [3000, 1000]
    with pytest.raises(ConfigError, match=r"training\.steps=501: set training\.steps=500 or raise"):
        plan_of(config.override("training.steps=501"), LENGTH)


def test_resume_goes_on_only_with_the_same_past(datasets: list[Path], tmp_path: Path) -> None:
    config = configure(datasets)
    corpus = Corpus(config.data)
    step = 20
    meta = {"step": step, "samples_seen": step * 8}
    meta |= corpus.describe_position(corpus.train_loader(config), step * 8)
    assert meta["dataset_samples"] == [120, 40]

    def check(config: Config) -> None:
        Corpus(config.data).check_position(tmp_path, meta, config)

    check(config)
    check(configure(datasets, stages=[{"step": step, "weights": [1, 9]}]))
    with pytest.raises(CheckpointError, match=r"from step 20 on with data\.stages"):
        check(configure(datasets, stages=[{"step": step - 5, "weights": [1, 9]}]))
    with pytest.raises(CheckpointError, match=r"\[120, 40\] .* have taken \[80, 80\]"):
        check(configure(datasets, weights=(1, 1)))
    # Another dataset may come in later.
    later = [{"step": step, "weights": [1, 1, 1]}]
    check(configure(datasets, weights=(3, 1, 0), stages=later))
    with pytest.raises(CheckpointError, match="have taken"):
        check(configure(datasets, weights=(3, 1, 1)))
    for others in ([datasets[1], datasets[0]], [datasets[0], datasets[2]]):
        with pytest.raises(DataError, match="another dataset"):
            check(configure(others))
    with pytest.raises(DataError, match="another dataset"):
        check(configure(datasets[:1], weights=(1,)))


def test_the_configuration_survives_its_own_yaml(datasets: list[Path], tmp_path: Path) -> None:
    config = configure(datasets, stages=[{"step": 3, "weights": [0.5, 1e-3]}])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=x"], r"data\.path=x and data\.mixture are both given"),
        (["data.mixture=[]"], "names no dataset"),
        (["data.mixture=[{path: a}]"], r"data\.mixture\[0\]=.* is not of the form"),
        (["data.mixture=[{path: a, weight: -1}]"], r"mixture\[0\]\.weight=-1 is not a positive"),
        (["data.mixture=[{path: a, weight: true}]"], r"mixture\[0\]\.weight=True is not"),
        (["data.mixture=[{path: a, weight: 0}]"], r"are all 0"),
        (["data.mixture=[{path: a, tokens: 0}]"], r"tokens=0 has to be above 0"),
        (["data.mixture=[{path: a, weight: 1}, {path: b, tokens: 1}]"], "weights and tokens"),
        (["data.stages=[{step: 0, weights: [1, 1]}]"], r"stages\[0\]\.step=0 has to be an integer"),
        (["data.stages=[{step: 5, weights: [1]}]"], r"is not a list of 2 numbers"),
        (["data.stages=[{step: 5, weights: [0, 0]}]"], r"one above 0"),
        (["data.stages=[{weights: [1, 1]}]"], r"is not of the form"),
        (["data.mixture=null", "data.path=x", "data.stages=[]"], "no effect without data.mixture"),
        (["data.mixture=3"], "is not a list or null"),
        (["data.random_length=1.5"], "at most 1"),
        (["data.on_bad_shard=ignore"], "did you mean"),
    ],
)
def test_mixtures_that_cannot_be(datasets: list[Path], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(datasets).override(*overrides).validate()


def test_datasets_that_do_not_go_together(datasets: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names one dataset twice"):
        Corpus(configure([datasets[0], datasets[0]]).data)
    for number, (change, message) in enumerate(
        (
            ({"block_length": 16}, "blocks of 16, not 32"),
            ({"tokenizer": "text8"}, "tokenizer "),
            ({"packing": "documents"}, "packing documents, not continuous"),
        )
    ):
        other = make(tmp_path / str(number), seed=9, **change)
        with pytest.raises(DataError, match=f"does not mix with .*{message}"):
            Corpus(configure([datasets[0], other]).data)


def test_what_cannot_train_is_refused_before_the_first_step(tmp_path: Path) -> None:
    path = make(tmp_path / "a", seed=1, count=12, tokenizer="text8")
    config = Config().override(
        f"data.path={path}", "training.global_batch=16", "training.micro_batch=4"
    )
    Corpus(config.data).check_use(config)
    large = config.override("training.global_batch=100000")
    with pytest.raises(DataError, match=r"training blocks, fewer than training\.global_batch="):
        Corpus(large.data).check_use(large)
    within = config.override("model.document_attention=true")
    with pytest.raises(ConfigError, match="EOS of its text8 tokenizer also stands inside"):
        Corpus(within.data).check_use(within)
    (path / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        Corpus(config.data).check_use(config)
    with pytest.raises(ConfigError, match=r"data\.path is null"):
        Corpus(Config().data)


def test_a_remote_dataset_needs_room(datasets: list[Path], tmp_path: Path) -> None:
    with serving(datasets[0]) as server:
        config = Config().override(
            f"data.path={server.url}",
            f"data.cache_dir={tmp_path}",
            "data.cache_gb=0.0001",
            "data.shuffle_window=80",
        )
        with pytest.raises(ConfigError, match=r"data\.cache_gb=0\.0001 does not hold the shards"):
            Corpus(config.data)
        config = config.override("data.cache_gb=1", "training.global_batch=8")
        remote = Corpus(config.data)
        remote.check_use(config)
        local = config.override(f"data.path={datasets[0]}")
        expected = Corpus(local.data).train_loader(local).batch(7, range(8))
        assert np.array_equal(remote.train_loader(config).batch(7, range(8)), expected)
        assert (remote.tokenizer_directory / "tokenizer.json").is_file()


@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_a_shard_of_another_size_stops_at_once_or_is_skipped(tmp_path: Path, how: str) -> None:
    path = make(tmp_path / "a", seed=1)
    shard = path / "train-000002.tar"
    content = shard.read_bytes()
    shard.unlink()
    if how == "cut short":
        shard.write_bytes(content[:5000])
    config = Config().override(f"data.path={path}", "training.global_batch=8")
    with pytest.raises(DataError, match=rf"train-000002\.tar .*{how}"):
        Corpus(config.data).check_use(config)
    config = config.override("data.on_bad_shard=skip")
    corpus = Corpus(config.data)
    corpus.check_use(config)
    loader = corpus.train_loader(config)
    samples = np.arange(len(loader.readers[0]))
    with pytest.raises(BadShardError, match=rf"train-000002\.tar .*{how}") as hit:
        loader.read_samples(samples)
    loader.skip([loader.joint.shard_of_error(hit.value)], from_step=0)
    assert loader.read_samples(samples).shape == (len(samples), LENGTH)


@pytest.mark.parametrize("window", ["null", "100"])
def test_a_skipped_shard_is_replaced_and_nothing_else(tmp_path: Path, window: str) -> None:
    path = make(tmp_path / "a", seed=1)
    config = Config().override(
        f"data.path={path}", "training.global_batch=8", f"data.shuffle_window={window}"
    )
    corpus = Corpus(config.data)
    whole, skipping = corpus.train_loader(config), corpus.train_loader(config)
    reader = whole.readers[0]
    samples = np.arange(3 * len(reader))
    before = whole.places(samples)[1]
    expected = whole.read_samples(samples)
    shard = path / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BadShardError, match=r"train-000002\.tar .*at byte 0") as hit:
        skipping.read_samples(samples)
    assert skipping.joint.shard_of_error(hit.value) == (0, 2)
    later = corpus.train_loader(config)
    later.skip([(0, 2)], from_step=10)
    assert np.array_equal(later.places(samples)[1][:80], before[:80])
    skipping.skip([(0, 2)], from_step=0)
    assert np.array_equal(later.places(samples)[1][80:], skipping.places(samples)[1][80:])
    after = skipping.places(samples)[1]
    gone = reader.shard_of_block(before) == 2
    assert gone.sum() == 3 * reader.shards[2]["blocks"]
    assert np.array_equal(after[~gone], before[~gone])
    assert not (reader.shard_of_block(after) == 2).any()
    # Replacements spread over the rest of their window.
    assert len(np.unique(after[gone])) > 0.5 * gone.sum()
    found = skipping.read_samples(samples)
    assert np.array_equal(found[~gone], expected[~gone])
    assert skipping.read_samples(samples[5:9]).tolist() == found[5:9].tolist()
    with pytest.raises(DataError, match="every training shard"):
        skipping.skip([(0, number) for number in range(len(reader.shards))], from_step=0)
