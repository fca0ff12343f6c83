"""Annealed attention in a whole network: it begins as the causal one and ends as the other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.config.rules import check_combinations
from sedd_scale.data.corpus import Corpus
from sedd_scale.errors import ConfigError
from sedd_scale.interop.initial_weights import check_same_model
from sedd_scale.model.attention import packed_context
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.training.batches import TrainBatches, ValidationBatches, hidden_after
from tests.datasets import dataset_of_words
from tests.evaluation.enumeration import tiny_model
from tests.tolerance import NETWORK

TOKENS, LENGTH = 9, 8


@torch.no_grad()
@pytest.mark.parametrize("documents", [False, True])
def test_step_0_is_the_causal_network_and_the_last_the_other(documents: bool) -> None:
    plain, causal = (
        tiny_model("absorb", "loglinear", num_tokens=TOKENS, block_length=LENGTH,
                   time_conditioning=False, objective=objective).network
        for objective in ("score_entropy", "autoregressive")
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    noisy_BL = torch.randint(TOKENS + 1, (3, LENGTH), generator=generator)
    keys_B = torch.randint(2**31, (3,), generator=generator)
    ends_BE = torch.tensor([[3, 8, 8], [2, 5, 8], [8, 8, 8]]) if documents else None

    def hidden_states(network: torch.nn.Module, hidden: int | None) -> Tensor:
        context_BK = packed_context(keys_B, ends_BE, hidden=hidden)
        return network.head_input((noisy_BL, torch.ones(3), context_BK))  # type: ignore

    begun = hidden_states(plain, hidden_after(0, 10))
    torch.testing.assert_close(begun, hidden_states(causal, None), rtol=NETWORK, atol=1e-5)
    whole = hidden_states(plain, None)
    assert hidden_after(10, 10) is None and hidden_after(0, 0) is None
    torch.testing.assert_close(hidden_states(plain, 0), whole, rtol=NETWORK, atol=1e-5)
    for step in (3, 9):
        between = hidden_states(plain, hidden_after(step, 10))
        assert (between - begun).norm() > 1e-3 and (between - whole).norm() > 1e-3


@pytest.mark.parametrize("documents", ["false", "true"])
def test_batches_say_how_much_is_hidden_as_a_function_of_the_step(
    tmp_path: Path, documents: str
) -> None:
    """So a resume has the same; validation and later steps are what they are without the key."""
    path = dataset_of_words(tmp_path / "d", 80, block_length=LENGTH, valid_fraction=0.1)
    config = Config().override(
        f"data.path={path}",
        *("training.global_batch=4", "training.micro_batch=2", "model.vocab_size=257"),
        f"model.document_attention={documents}",
    )
    corpus, layout = Corpus(config.data), initialize_layout()
    annealed = config.override("training.anneal_steps=5")
    without, once, again = (
        TrainBatches(corpus, one, layout) for one in (config, annealed, annealed)
    )
    valid, plain = (ValidationBatches(corpus, one, layout) for one in (annealed, config))
    for step in (4, 0, 5, 6):
        for batch, same, other in zip(
            *(made.of_step(step).micro_batches for made in (once, again, without)), strict=True
        ):
            assert all(map(torch.equal, batch.inputs, same.inputs))
            assert all(map(torch.equal, batch.inputs[:2], other.inputs[:2]))
            context_BK, bare_BK = batch.inputs[2], other.inputs[2]
            if step >= 5:
                assert torch.equal(context_BK, bare_BK)
                continue
            assert context_BK[:, 1].tolist() == [round(2**32 * (1 - step / 5))] * 2
            assert torch.equal(torch.cat([context_BK[:, :1], context_BK[:, 2:]], dim=1), bare_BK)
    for batch, other in zip(valid.micro_batches, plain.micro_batches, strict=True):
        assert all(map(torch.equal, batch.inputs, other.inputs))


def test_a_causal_source_starts_a_run_that_anneals() -> None:
    config = Config().override("model.vocab_size=9")
    source = config.override("training.objective=autoregressive")
    check_same_model(config.override("training.anneal_steps=3"), source, "the source")
    with pytest.raises(ConfigError, match=r"or training\.anneal_steps"):
        check_same_model(config, source, "the source")
    with pytest.raises(ConfigError, match="its attention is another"):
        check_same_model(source, config, "the source")
    for change in ("training.objective=autoregressive", "model.attention=flash"):
        with pytest.raises(ConfigError, match=r"training\.anneal_steps"):
            check_combinations(config.override("training.anneal_steps=3", change))
