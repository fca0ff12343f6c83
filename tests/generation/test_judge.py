"""Generative perplexity against a computation by hand, and judges that are not there."""

import math
from pathlib import Path

import pytest
import torch

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.generation.judge import Judge, Score, check_judge, perplexities
from tests.generation.tiny_judge import CONTEXT, nats_by_hand, write_judge

pytest.importorskip("transformers", reason="the judge extra is not installed")

TEXTS = ["abc", "hgfe dcb", "", "a", "a cab had a bad bag", "zzz"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judge") / "tiny")


def test_scores_are_those_of_the_computation_by_hand(judge: Path) -> None:
    check_judge(str(judge))
    model = Judge(str(judge), torch.device("cpu"))
    assert model.context == CONTEXT < len(TEXTS[4])
    scores = model.scores(TEXTS)
    by_hand = [nats_by_hand(judge, text) for text in TEXTS]
    assert [score.tokens for score in scores] == [len(nats) for nats in by_hand]
    assert [score.tokens for score in scores] == [2, 7, 0, 0, 16, 2]
    for score, nats in zip(scores, by_hand):
        assert score.nats == pytest.approx(sum(nats), rel=1e-5)
    alone = [model.scores([text])[0] for text in TEXTS]
    assert [score.nats for score in alone] == pytest.approx([score.nats for score in scores])

    found = perplexities(scores)
    scored = [nats for nats in by_hand if nats]
    mean = sum(math.exp(sum(nats) / len(nats)) for nats in scored) / len(scored)
    corpus = math.exp(sum(map(sum, scored)) / sum(map(len, scored)))
    assert found["mean_of_samples"] == pytest.approx(mean, rel=1e-5)
    assert found["of_corpus"] == pytest.approx(corpus, rel=1e-5)
    assert (found["samples_scored"], found["samples_unscored"]) == (4, 2)
    assert found["tokens_scored"] == 27
    assert mean != pytest.approx(corpus, rel=0.01)  # the two are not one


def test_perplexities_of_nothing_and_of_the_impossible() -> None:
    assert perplexities([Score(0.0, 0)])["of_corpus"] is None
    assert perplexities([Score(1e6, 2), Score(1.0, 1)])["mean_of_samples"] == math.inf


def test_a_judge_that_is_not_there_is_named(tmp_path: Path, judge: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.gguf").write_bytes(b"text")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((judge / "model.safetensors").read_bytes())
    for name, message in [
        (tmp_path / "none", "does not exist"),
        (tmp_path / "none.gguf", "does not exist"),
        (tmp_path / "no.gguf", "is not a GGUF file"),
        (tmp_path / "empty", "holds no weights"),
        (bare, "cannot be read"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            check_judge(str(name))
        assert str(name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, judge: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs transformers.*sedd_scale\[judge\]"):
        check_judge(str(judge))
