"""Outputs for the next position: `training.shift` against plain loops over whole logits."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.errors import DataError
from sedd_scale.model.logit_model import LogitModel
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from tests.diffusion.reference import log_score_score_entropy, noise_columns
from tests.evaluation.enumeration import tiny_model
from tests.tolerance import NETWORK

TOKENS, LENGTH, EOS = 9, 8, 4
KINDS = [("absorb", False), ("absorb mean", False), ("uniform", False), ("mean", False)]
KINDS += [("absorb", True), ("uniform", True)]


def models(graph: str, *, documents: bool = False, **options: Any) -> tuple[ScoreModel, ScoreModel]:
    """The same weights with outputs for the next position, and for their own."""
    changes = {"document_attention": documents}
    made = [
        tiny_model(graph, "loglinear", num_tokens=TOKENS, block_length=LENGTH, changes=changes,
                   shift=shift, **options)
        for shift in (True, False)
    ]  # fmt: skip
    for model in made:
        model.tokenizer = types.SimpleNamespace(eos_id=EOS)
    return made[0], made[1]


def clean_batch() -> Tensor:
    """Blocks with an EOS at the start, in the middle, at the end and none."""
    clean_BL = torch.randint(TOKENS, (4, LENGTH), generator=torch.Generator().manual_seed(3))
    clean_BL[clean_BL == EOS] = 0
    clean_BL[0, 0] = clean_BL[1, 3] = clean_BL[1, 4] = clean_BL[2, -1] = EOS
    return clean_BL


def begins(clean_L: Tensor, *, documents: bool) -> list[int]:
    """First positions of documents."""
    after = [place + 1 for place, token in enumerate(clean_L.tolist()) if token == EOS]
    return [0, *(after if documents else [])]


@torch.no_grad()
@pytest.mark.parametrize(("graph", "documents"), KINDS)
def test_losses_and_rows_are_those_of_the_row_before(graph: str, documents: bool) -> None:
    model, own = models(graph, documents=documents)
    clean_BL = clean_batch()
    t_B = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
    noise = RowNoise(*noise_columns(model.schedule, t_B).unbind(1))
    move, token = torch.rand(2, 4, LENGTH, dtype=torch.float64, generator=torch.Generator())
    noisy_BL = model.graph.corrupt(clean_BL, noise.sigma, move, token)
    every_M, ends_BE = torch.arange(clean_BL.numel()), model.document_ends(clean_BL)
    table = own.logits(noisy_BL, noise.sigma, every_M, ends_BE).view(4, LENGTH, -1)
    moved = table.clone()
    for b in range(4):
        for place in range(LENGTH):
            if place not in begins(clean_BL[b], documents=documents):
                moved[b, place] = table[b, place - 1]
    found = model.logits(noisy_BL, noise.sigma, every_M, ends_BE)
    torch.testing.assert_close(found.view_as(moved), moved, rtol=NETWORK, atol=NETWORK)
    if not documents:
        torch.testing.assert_close(
            model.log_score(noisy_BL, noise.sigma),
            model.law.log_scores(moved, noisy_BL, noise.sigma),
            rtol=NETWORK, atol=NETWORK,
        )  # fmt: skip
    log_score = model.law.log_scores(moved.double(), noisy_BL, noise.sigma)
    expected = log_score_score_entropy(log_score, noisy_BL, clean_BL, noise, graph=model.graph)
    loss_B = model.loss(clean_BL, t_B=t_B, xt_BL=noisy_BL)
    torch.testing.assert_close(loss_B.double(), expected.sum(1), rtol=NETWORK, atol=0.0)


@pytest.mark.parametrize("documents", [False, True])
def test_a_causal_loss_is_next_token_cross_entropy(documents: bool) -> None:
    """Shown the tokens themselves; a document's first token has no loss."""
    model, _ = models("absorb", documents=documents, objective="autoregressive")
    clean_BL = clean_batch()
    every_M, no_sigma_B = torch.arange(clean_BL.numel()), torch.zeros(4)
    ends_BE = model.document_ends(clean_BL)
    table = model.logits(clean_BL, no_sigma_B, every_M, ends_BE).view(4, LENGTH, -1)
    log_law = table[..., :TOKENS].double().log_softmax(-1)
    expected_B = torch.zeros(4, dtype=torch.float64)
    for b in range(4):
        for place in range(LENGTH):
            if place not in begins(clean_BL[b], documents=documents):
                expected_B[b] -= log_law[b, place - 1, clean_BL[b, place]]
    loss_B = model.loss(clean_BL)
    torch.testing.assert_close(loss_B.double(), expected_B, rtol=NETWORK, atol=0.0)
    # No position sees what it predicts.
    changed_BL = clean_BL.clone()
    changed_BL[:, -1] = (clean_BL[:, -1] + 1) % TOKENS
    later = model.logits(changed_BL, no_sigma_B, every_M, ends_BE).view(4, LENGTH, -1)
    if not documents:
        assert torch.equal(later[:, :-1], table[:, :-1])
    loss_B.sum().backward()
    assert all(weight.grad is not None for weight in model.network.head.parameters())


class Rolled(LogitModel):
    """The same from rows of a network whose outputs are for their own positions."""

    def __init__(self, network: ScoreModel) -> None:
        self.network = network
        for name in ("graph", "schedule", "law", "objective", "config", "layout"):
            setattr(self, name, getattr(network, name))

    device = torch.device("cpu")
    time_conditioned = True

    def rows(
        self, tokens_BL: Tensor, sigma_B: Tensor, rows_M: Tensor, ends_BE: Tensor | None = None
    ) -> Tensor:
        length = tokens_BL.shape[1]
        before = []
        for row in rows_M.tolist():
            begin = [0] if ends_BE is None else [0, *ends_BE[row // length].tolist()]
            before.append(row if row % length in begin else row - 1)
        return self.network.rows(tokens_BL, sigma_B, torch.tensor(before), ends_BE)

    def logits_of(self, rows_MW: Tensor) -> Tensor:
        return self.network.logits_of(rows_MW)


@pytest.mark.parametrize(
    ("graph", "sampler"),
    [("absorb", "analytic"), ("absorb", "confidence"), ("absorb", "first-hitting"),
     ("absorb mean", "ancestral"), ("uniform", "euler")],
)  # fmt: skip
def test_samplers_take_the_rows_before(graph: str, sampler: str) -> None:
    """Token for token, around given ones and beside padding."""
    model, own = models(graph)
    given_BL, fixed_BL = clean_batch(), torch.zeros(4, LENGTH, dtype=torch.bool)
    fixed_BL[0, :3] = fixed_BL[1, 2] = fixed_BL[2, -1] = True
    settings = SamplerSettings(sampler, steps=4)
    options = {"seed": 3, "lengths_B": [LENGTH, 5, LENGTH, 1]}
    found, expected = (draw(kind, given_BL, fixed_BL, settings, **options)
                       for kind in (model, Rolled(own)))  # fmt: skip
    assert torch.equal(found, expected)
    assert not torch.equal(found, draw(own, given_BL, fixed_BL, settings, **options))


def test_a_first_token_that_nobody_knows_is_asked_for() -> None:
    model, _ = models("absorb", objective="autoregressive")
    blank = torch.zeros(1, 3, dtype=torch.int64)
    assert draw(model, blank, blank.bool(), SamplerSettings("left-to-right"))[0, 0] == EOS
    model.tokenizer = None
    with pytest.raises(DataError, match=r"predicts no first token .*: give it"):
        draw(model, blank, blank.bool(), SamplerSettings("left-to-right"))
