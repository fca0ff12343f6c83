"""Chunks are sized for their device, and change no draw."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_scale.config import Config
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.sampling import chunks, head_outputs, token_law
from sedd_scale.sampling.chunks import rows_per_chunk
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.sampling.token_law import TokenLaw


def test_a_gpu_gets_thousands_of_rows_and_a_cpu_what_its_cache_holds() -> None:
    row_bytes = 4 * 50_258
    cpu = rows_per_chunk(torch.device("cpu"), row_bytes=row_bytes, cpu_bytes=48 * 2**20)
    gpu = rows_per_chunk(torch.device("cuda"), row_bytes=row_bytes, cpu_bytes=48 * 2**20)
    assert (cpu, gpu) == (250, 5341)
    assert rows_per_chunk(torch.device("cpu"), row_bytes=2**40, cpu_bytes=1) == 16


def test_draws_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(70, 9, generator=generator), torch.rand(70, generator=generator)
    law = TokenLaw(SamplerSettings(sampler="ancestral", steps=4, top_p=0.9))
    whole = law.draw(logits, uniforms.double())
    monkeypatch.setattr("sedd_scale.sampling.token_law.CPU_DRAW_BYTES", 1)
    monkeypatch.setattr(chunks, "_LEAST", 3)
    assert torch.equal(law.draw(logits, uniforms.double()), whole)


class Asked(TorchDispatchMode):
    """Counts how often the host asks a tensor whether something is so."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.times += args[0].dtype == torch.bool
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("graph", "sampler"),
    [
        ("uniform", "analytic"),
        *(("absorb", one) for one in ("analytic", "ancestral", "confidence")),
    ],
)
def test_the_host_asks_as_often_however_many_chunks(
    graph: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "model.cond_dim=8")
    config = Config().override(*small, "model.vocab_size=11", f"graph.name={graph}")
    model = ScoreModel(config, 11, initialize_layout(), block_length=12).eval()
    settings = SamplerSettings(sampler=sampler, steps=4)
    nothing_BL = torch.zeros(2, 12, dtype=torch.int64)
    times, drawn = [], []
    for least in (16, 2):
        for module in (head_outputs, token_law):
            monkeypatch.setattr(module, "rows_per_chunk", lambda *_, least=least, **__: least)
        with Asked() as asked:
            drawn.append(draw(model, nothing_BL, nothing_BL.bool(), settings, seed=3))
        times.append(asked.times)
    assert torch.equal(*drawn)
    assert times[0] == times[1] > 0
