"""Bidirectional attention against the formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from sedd_scale.errors import ConfigError
from sedd_scale.model.attention import (
    CoreAttention,
    attention,
    document_bounds,
    documents_of,
)

LENGTH, BATCH, HEADS, DIM = 7, 3, 2, 5


def query_key_value(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (LENGTH, BATCH, HEADS, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"]


def by_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One position of one head of one sequence at a time."""
    output = torch.empty_like(value)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(LENGTH):
                weights = torch.stack(
                    [(query[i, b, h] @ key[j, b, h] / math.sqrt(DIM)).exp() for j in range(LENGTH)]
                )
                output[i, b, h] = (weights / weights.sum()) @ value[:, b, h]
    return output


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_it_is_the_softmax_of_scaled_products(backend: str) -> None:
    inputs = query_key_value()
    found = attention(*inputs, backend=backend)
    torch.testing.assert_close(found, by_formula(*inputs), rtol=1e-12, atol=1e-12)


def test_half_precision_on_a_cpu_falls_back() -> None:
    inputs = query_key_value(torch.bfloat16)
    found = attention(*inputs)
    assert found.dtype == torch.bfloat16
    expected = by_formula(*(part.double() for part in inputs))
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def test_every_position_sees_every_other_in_any_order() -> None:
    """Permuted positions give permuted outputs, and each key moves each output: no causal mask."""
    inputs = query_key_value()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(2))
    whole = attention(*inputs)
    permuted = attention(*(part[order] for part in inputs))
    torch.testing.assert_close(permuted, whole[order], rtol=1e-12, atol=1e-12)

    value = inputs[2].clone().requires_grad_()
    for i in range(LENGTH):
        output = attention(inputs[0], inputs[1], value)[i].sum()
        (gradient,) = torch.autograd.grad(output, value)
        assert (gradient > 0).all()


def test_the_module_lays_heads_side_by_side() -> None:
    inputs = query_key_value()
    found = CoreAttention(None)(*inputs, attention_mask=None)
    torch.testing.assert_close(found, by_formula(*inputs).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_that_cannot_run_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention=flash cannot run .* on cpu.*auto"):
        attention(*query_key_value(dtype), backend="flash")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_documents_do_not_see_each_other(dtype: torch.dtype) -> None:
    """Attention with document ids is attention on each document by itself."""
    generator = torch.Generator().manual_seed(2)
    documents_BL = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    query, key, value = torch.randn(3, 8, 2, 2, 4, generator=generator, dtype=dtype)
    found = attention(query, key, value, documents_BL=documents_BL)
    for sequence, documents in enumerate(documents_BL):
        for document in documents.unique():
            here = documents == document
            parts = (tensor[here, sequence : sequence + 1] for tensor in (query, key, value))
            alone = attention(*parts)
            torch.testing.assert_close(found[here, sequence : sequence + 1], alone)


def test_bounds_of_documents_are_those_of_flattened_runs() -> None:
    documents_BL = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]])
    assert document_bounds(documents_BL).tolist() == [0, 2, 4, 8, 9, 10, 11, 12]
    assert document_bounds(documents_BL).dtype == torch.int32


def test_the_end_of_a_document_belongs_to_it() -> None:
    tokens_BL = torch.tensor([[5, 9, 3, 9, 9, 1], [9, 1, 2, 3, 4, 5]])
    assert documents_of(tokens_BL, 9).tolist() == [[0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1]]
