"""Compiled passes over the shapes that come in practice, captured here and run by eager kernels."""

import subprocess
import sys

import pytest
import torch

from sedd_scale.config import Config
from sedd_scale.model import compiled, dropout, fused
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from tests.repository import ROOT

PASSES = [
    *(fused._norm_forward, fused._gate_forward, fused._gelu_forward, fused._turn),
    dropout._row_hashes,
]
SMALL = (
    *("model.hidden_size=32", "model.num_layers=3", "model.num_heads=2", "model.cond_dim=16"),
    *("model.vocab_size=50", "data.block_length=24", "model.zero_init=false"),
)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch):
    """Passes are compiled on a CPU as they would be on a GPU, with eager kernels."""
    monkeypatch.setattr(compiled, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    yield
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


def variants() -> dict[str, int]:
    """How often each pass was compiled."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return {
        function.__name__: len(_debug_get_cache_entry_list(function.__wrapped__.__code__))
        for function in PASSES
    }


def model_of(dtype: torch.dtype, *overrides: str) -> ScoreModel:
    config = Config().override(*SMALL, *overrides)
    return ScoreModel(config, 50, initialize_layout(), block_length=24).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["analytic", "ancestral", "first-hitting", "confidence"])
def test_batches_of_every_size_need_few_variants(
    sampler: str, dtype: torch.dtype, captured: None
) -> None:
    model = model_of(dtype)
    steps = None if sampler in ("first-hitting", "confidence") else 8
    settings = SamplerSettings(sampler=sampler, steps=steps)
    for batch in (8, 6, 5, 3, 1, 2):
        nothing = torch.zeros(batch, 24, dtype=torch.long)
        draw(model, nothing, nothing.bool(), settings, seed=1)
    made = variants()
    assert made.pop("_gate_forward") <= 8, made  # with a bias and without
    assert max(made.values()) <= 4, made
    assert made["_norm_forward"] and made["_gelu_forward"] and made["_turn"]


def test_losses_of_every_size_need_few_variants(captured: None) -> None:
    """A plain loop over batches of several sizes with dropout, each evaluated after it."""
    model = model_of(torch.float32, "model.dropout=0.1")
    for batch in (4, 4, 2, 3, 1):
        model.train()
        model.loss(torch.randint(50, (batch, 24))).mean().backward()
        model.eval()
        with torch.no_grad():
            model.loss(torch.randint(50, (batch, 24)))
    made = variants()
    # With dropout and without: twice the variants.
    assert made.pop("_gate_forward") <= 12, made
    assert max(made.values()) <= 6, made
    assert made["_gelu_forward"] and made["_row_hashes"]


def test_a_switch_turns_compilation_off() -> None:
    program = (
        "import torch\n"
        "from sedd_scale.model import compiled\n"
        "compiled.on_gpu = lambda tensor: True\n"
        "def refuse(*args, **options): raise SystemExit('compiled')\n"
        "torch.compile = refuse\n"
        "double = compiled.compiled_on_gpu(lambda tensor: 2 * tensor)\n"
        "print(float(double(torch.ones(()))))"
    )
    for value, printed in (("0", "2.0\n"), ("1", "")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PATH": "", "SEDD_COMPILE": value},
            capture_output=True,
            text=True,
        )
        assert done.stdout == printed, done.stderr
