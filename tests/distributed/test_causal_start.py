"""A run that begins with a model of transformers has its loss and gradient, under every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sedd_scale.config import load_config
from sedd_scale.config.sections import NETWORK
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.training.loop import open_dataset
from tests.distributed.runs import Run, train_runs
from tests.repository import ROOT
from tests.tolerance import NETWORK as TOLERANCE

TOKENS, LENGTH = 257, 32
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
MODELS = ("GPT-2", "Llama", "Qwen3")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP2": (2, ("parallel.tensor=2",)),
    "PP2": (2, ("parallel.pipeline=2",)),
    "DP2 ZeRO 3": (2, ("parallel.zero_stage=3",)),
    "TP2 PP2": (4, ("parallel.tensor=2", "parallel.pipeline=2")),
}


def model_of(name: str) -> Any:
    """With random weights, norms too; GPT-2's and Qwen3's head are tied."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    if name == "GPT-2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
        config = GPT2Config(vocab_size=TOKENS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes)
        model: Any = GPT2LMHeadModel(config)
    elif name == "Llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Run]:
    """One step of each model under each layout: three launches."""
    folder = tmp_path_factory.mktemp("causal")
    made = {}
    for model in MODELS:
        model_of(model).save_pretrained(folder / model)
        described = open_checkpoint(folder / model).described.config
        network = [
            f"{key}={scalar_text(value)}"
            for key, field, value in described.all_keys()
            if field.metadata["shared"] == NETWORK and value != field.default
        ]
        given = (
            *(f"data.path={dataset}", f"model.init_from={folder / model}", *network),
            *("training.objective=autoregressive", "training.steps=1", "logging.every=1"),
            *("training.valid_every=0", "checkpoint.every=1"),
        )
        for layout, (_, overrides) in LAYOUTS.items():
            run = Run(folder / f"{model}, {layout}", (*given, *overrides))
            made[model, layout] = run
    for size in sorted({size for size, _ in LAYOUTS.values()}):
        of_size = [run for (_, layout), run in made.items() if LAYOUTS[layout][0] == size]
        train_runs(size, of_size, folder / f"jobs-{size}.json")
    return made


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_transformers(
    runs: dict[tuple[str, str], Run], name: str
) -> None:
    config, corpus = open_dataset(
        load_config(ROOT / "configs/runs/tiny.yaml", runs[name, "one process"].overrides)
    )
    loader = corpus.train_loader(config)
    samples = loader.sample_ids(0, range(config.training.global_batch))
    tokens_BL = torch.from_numpy(loader.read_samples(samples)).long()
    model = model_of(name)
    loss = model(input_ids=tokens_BL, labels=tokens_BL).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    for layout in LAYOUTS:
        run = runs[name, layout]
        assert run.series("loss") == pytest.approx([float(loss.detach())], rel=TOLERANCE), layout
        assert run.series("grad_norm") == pytest.approx([float(norm)], rel=TOLERANCE), layout
