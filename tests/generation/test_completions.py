"""Samples and infillings in one call: what is given stays, padding is seen or not as stated."""

import numpy as np
import pytest
import torch

import sedd_scale
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling import samplers_of
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from tests.evaluation.enumeration import tiny_model


@pytest.fixture(scope="module")
def model() -> ScoreModel:
    model = tiny_model("absorb", "loglinear", num_tokens=257, block_length=10)
    model.tokenizer = BytesTokenizer()
    return model


def test_samples_do_not_depend_on_how_many_are_drawn(model: ScoreModel) -> None:
    three = sedd_scale.sample(model, 3, seed=5, steps=4)
    assert [len(one.tokens) for one in three] == [10, 10, 10]
    assert sedd_scale.sample(model, 3, seed=5, steps=4, batch_size=2) == three
    assert sedd_scale.sample(model, seed=5, steps=4) == three[:1]
    (short,) = sedd_scale.sample(model, length=3, steps=2)
    assert len(short.tokens) == 3 and short.text == model.tokenizer.decode(short.tokens)


@pytest.mark.parametrize("sampler", samplers_of("absorb"))
def test_every_kind_of_given_tokens_stays(model: ScoreModel, sampler: str) -> None:
    options = {"sampler": sampler, "steps": 3, "num_samples": 2}
    for one in sedd_scale.infill(model, "ab[blank:3]c____", **options):
        assert len(one.tokens) == 10
        assert bytes(one.tokens[:2]) == b"ab" and one.tokens[5] == ord("c")
    for one in sedd_scale.infill(model, prefix="x", suffix="yz", length=7, **options):
        assert one.tokens[0] == ord("x") and bytes(one.tokens[5:]) == b"yz"
    for one in sedd_scale.infill(model, tokens=[9, 256, 3], positions=[8, 0, 4], **options):
        assert [one.tokens[place] for place in (8, 0, 4)] == [9, 256, 3]


def test_padding_to_the_block_is_eos_that_the_network_sees(model: ScoreModel) -> None:
    text, options = "ab[blank:4]", {"steps": 3, "seed": 2}
    (alone,) = sedd_scale.infill(model, text, **options)
    (in_block,) = sedd_scale.infill(model, text, pad_to_block=True, **options)
    assert len(alone.tokens) == len(in_block.tokens) == 6
    tokens = np.full((1, 10), 256)
    tokens[0, :2] = list(b"ab")
    fixed = np.ones((1, 10), dtype=bool)
    fixed[0, 2:6] = False
    expected = draw(
        model, torch.from_numpy(tokens), torch.from_numpy(fixed), SamplerSettings(steps=3), seed=2
    )
    assert in_block.tokens == expected[0, :6].tolist()
    expected = draw(
        model,
        torch.from_numpy(tokens),
        torch.from_numpy(fixed),
        SamplerSettings(steps=3),
        seed=2,
        lengths_B=[6],
    )
    assert alone.tokens == expected[0, :6].tolist()
    assert (expected[0, 6:] == 256).all()


def test_what_cannot_be_used_is_refused(model: ScoreModel) -> None:
    for error, match, keys in (
        (DataError, "exactly one of", {}),
        (DataError, "exactly one of", {"text": "a____", "prefix": "b"}),
        (DataError, "go together", {"tokens": [1]}),
        (DataError, "more than the length 10", {"text": "abcdefghij____"}),
        (ConfigError, "unknown sampler option 'temprature'", {"prefix": "a", "temprature": 1.0}),
        (ConfigError, "num_samples=0", {"prefix": "a", "num_samples": 0}),
    ):
        with pytest.raises(error, match=match):
            sedd_scale.infill(model, **keys)
    plain = tiny_model("absorb", "loglinear")
    with pytest.raises(DataError, match="no tokenizer"):
        sedd_scale.infill(plain, prefix="a")
    with pytest.raises(ConfigError, match="length=0"):
        sedd_scale.sample(plain, length=0)
