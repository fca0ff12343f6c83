"""Chunks are sized for their device, and change no draw."""

import pytest
import torch

from sedd_scale.sampling import chunks
from sedd_scale.sampling.chunks import rows_per_chunk
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
