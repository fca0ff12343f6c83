"""Autoregressive samples: the cache changes nothing, the law is the chain rule's."""

import types

import numpy as np
import pytest
import torch

import sedd_scale
from sedd_scale.diffusion.objectives import shifted
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.evaluation.bound import evaluate_bound
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling.samplers import draw, start_batch
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.sampling.token_law import TokenLaw
from tests.evaluation.enumeration import all_states, tiny_model

LENGTH = 9
LEFT_TO_RIGHT = "left-to-right"


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shift"])
def model(request: pytest.FixtureRequest) -> ScoreModel:
    return autoregressive(6, shift=request.param)


def autoregressive(num_tokens: int, *, shift: bool) -> ScoreModel:
    """Of a tokenizer whose EOS is token 1."""
    made = tiny_model(
        "absorb",
        "loglinear",
        objective="autoregressive",
        num_tokens=num_tokens,
        block_length=LENGTH,
        shift=shift,
    )
    made.tokenizer = types.SimpleNamespace(eos_id=1, decode=str) if shift else None
    return made


@torch.no_grad()
def without_cache(
    model: ScoreModel, given_BL: torch.Tensor, fixed_BL: torch.Tensor, settings: SamplerSettings
) -> torch.Tensor:
    """The same draws, with the whole prefix through the network for every position."""
    batch = start_batch(model, given_BL, fixed_BL, settings, seed=4)
    free_BL = batch.free_R.view(given_BL.shape)
    uniform_BL = batch.draws.uniform("token", 0).view(given_BL.shape)
    num, length = given_BL.shape
    for place in range(length):
        shown_BL = shifted(batch.state_BL[:, : place + 1], model.graph)
        rows = torch.arange(num) * (place + 1) + place
        if model.config.training.shift:
            if place == 0:
                continue
            shown_BL = batch.state_BL[:, :place]
            rows = torch.arange(num) * place + place - 1
        logits = model.logits(shown_BL, torch.zeros(num), rows)[:, : model.graph.num_tokens]
        drawn = TokenLaw(settings).draw(logits, uniform_BL[:, place])
        batch.state_BL[:, place] = torch.where(free_BL[:, place], drawn, batch.state_BL[:, place])
    return batch.state_BL


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8}])
def test_the_cache_changes_no_token(model: ScoreModel, options: dict[str, float]) -> None:
    """Prefixes of different lengths side by side, none among them."""
    settings = SamplerSettings(LEFT_TO_RIGHT, **options)
    given_BL = torch.randint(6, (40, LENGTH), generator=torch.Generator().manual_seed(1))
    fixed_BL = torch.arange(LENGTH) < (torch.arange(40) % 6)[:, None]
    found_BL = draw(model, given_BL, fixed_BL, SamplerSettings(LEFT_TO_RIGHT, **options), seed=4)
    assert torch.equal(found_BL, without_cache(model, given_BL, fixed_BL, settings))
    assert torch.equal(found_BL[fixed_BL], given_BL[fixed_BL])
    assert model.network.hidden(given_BL[:, :4], torch.zeros(40)).shape[0] == 4  # no cache is left


def test_samples_follow_the_likelihood() -> None:
    """Frequencies of all 27 sequences against their exact probabilities: chi-squared."""
    model = autoregressive(3, shift=False)
    every_nL = all_states(3, 3)
    chance_n = np.exp(-3 * evaluate_bound(model, every_nL).block_nats_n)
    count = 20_000
    blank = torch.zeros(count, 3, dtype=torch.int64)
    drawn_BL = draw(model, blank, blank.bool(), SamplerSettings(LEFT_TO_RIGHT), seed=2)
    index_B = (drawn_BL * torch.tensor([9, 3, 1])).sum(1)
    found_n = torch.bincount(index_B, minlength=27).numpy()
    expected_n = count * chance_n
    chi_squared = float(((found_n - expected_n) ** 2 / expected_n).sum())
    assert chi_squared < 26 + 5 * (2 * 26) ** 0.5


def test_without_a_first_token_samples_follow_the_likelihood_given_eos() -> None:
    model = autoregressive(3, shift=True)
    rest_nL = all_states(3, 3)
    every_nL = torch.cat([torch.ones(27, 1, dtype=torch.int64), rest_nL], dim=1)
    chance_n = np.exp(-3 * evaluate_bound(model, every_nL).block_nats_n)
    assert chance_n.sum() == pytest.approx(1.0, abs=1e-6)
    count = 20_000
    blank = torch.zeros(count, 4, dtype=torch.int64)
    drawn_BL = draw(model, blank, blank.bool(), SamplerSettings(LEFT_TO_RIGHT), seed=2)
    assert (drawn_BL[:, 0] == 1).all()
    found_n = torch.bincount((drawn_BL[:, 1:] * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    expected_n = count * chance_n
    chi_squared = float(((found_n.numpy() - expected_n) ** 2 / expected_n).sum())
    assert chi_squared < 26 + 5 * (2 * 26) ** 0.5


def test_a_sample_is_the_same_in_any_company(model: ScoreModel) -> None:
    three = sedd_scale.sample(model, 3, seed=5)
    assert sedd_scale.sample(model, 3, seed=5, batch_size=1) == three
    (one,) = sedd_scale.infill(model, tokens=[5, 1], positions=[0, 1], seed=5)
    assert one.tokens[:2] == [5, 1] and len(one.tokens) == LENGTH
    given = torch.tensor([[2, 0, 0, 0], [1, 1, 0, 0]])
    fixed = torch.tensor([[True, False, False, False], [True, True, False, False]])
    both = draw(model, given, fixed, SamplerSettings(LEFT_TO_RIGHT), lengths_B=[4, 3])
    short = draw(
        model, given[1:, :3], fixed[1:, :3], SamplerSettings(LEFT_TO_RIGHT), sample_ids_B=[1]
    )
    assert both[1, :3].tolist() == short[0].tolist() and int(both[1, 3]) == 0


def test_what_an_autoregressive_model_cannot_do_is_refused(model: ScoreModel) -> None:
    blank = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="does not go with an autoregressive model"):
        draw(model, blank, blank.bool(), SamplerSettings("analytic"))
    with pytest.raises(ConfigError, match="does not go with a diffusion model"):
        draw(tiny_model("absorb", "loglinear"), blank, blank.bool(), SamplerSettings(LEFT_TO_RIGHT))
    with pytest.raises(DataError, match="position 2 is given after position 1"):
        sedd_scale.infill(model, tokens=[0, 3], positions=[0, 2])
    with pytest.raises(ConfigError, match="steps=3 does not go with sampler left-to-right"):
        sedd_scale.sample(model, steps=3)
