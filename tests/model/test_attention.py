"""Bidirectional attention against the formula in float64."""

import inspect
import itertools
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode

from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.errors import ConfigError
from sedd_scale.model import attention as module
from sedd_scale.model.attention import (
    Annealed,
    Context,
    CoreAttention,
    WholeSequence,
    WithinDocuments,
    attention,
    document_bounds,
    document_ends,
    documents_of,
    packed_context,
)
from sedd_scale.model.block import costly
from sedd_scale.parallel.layout import initialize_layout
from tests.model.small_network import noisy_batch, small_network

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
    found = CoreAttention(None)(*inputs, attention_mask=WholeSequence())
    torch.testing.assert_close(found, by_formula(*inputs).flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_that_cannot_run_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention=flash cannot run .* on cpu.*auto"):
        attention(*query_key_value(dtype), backend="flash")


ENDS_BE = torch.tensor([[3, 5, 8], [1, 8, 8]])
"""Documents of 3, 2 and 3 positions, and of 1 and 7."""


def by_pytorch(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    return attention(query, key, value, pattern=WholeSequence(causal=causal), backend="sdpa")


def alone(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Attention on each of the documents of `ENDS_BE` by itself."""
    output = torch.empty_like(value)
    for sequence, ends in enumerate(ENDS_BE.tolist()):
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            here = (slice(begin, end), slice(sequence, sequence + 1))
            output[here] = by_pytorch(query[here], key[here], value[here], causal=causal)
    return output


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_documents_do_not_see_each_other(dtype: torch.dtype, causal: bool) -> None:
    """Attention with the ends of documents is attention on each document by itself."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 8, 2, 2, 4, generator=generator, dtype=dtype)
    found = attention(*inputs, pattern=WithinDocuments(ENDS_BE, causal=causal))
    torch.testing.assert_close(found, alone(*inputs, causal=causal))


KEYS_B = torch.randint(2**31, (64,), generator=torch.Generator().manual_seed(6))
NO_ENDS = torch.empty(64, 0, dtype=torch.int64)


def annealed(share: float, *, keys_B: Tensor = KEYS_B, ends_BE: Tensor = NO_ENDS) -> Annealed:
    """Of later positions this share is seen."""
    hidden_B = torch.full_like(keys_B, round(2**32 * (1 - share)))
    return Annealed(keys_B, hidden_B, ends_BE[: len(keys_B)])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_a_share_of_later_positions_is_seen(share: float) -> None:
    """Fair coins, no two alike for samples, queries or keys; more of them as the share grows."""
    length = 48
    mask_BLL = annealed(share).mask(length)[:, 0]
    assert mask_BLL.tril().sum() == 64 * length * (length + 1) // 2
    row, column = torch.triu_indices(length, length, 1)
    coins_BP = mask_BLL[:, row, column].double()
    spread = math.sqrt(share * (1 - share))
    assert abs(coins_BP.mean() - share) < 5 * spread / math.sqrt(coins_BP.numel())
    for dim in (0, 1):  # by pair of positions, and by sample
        z = (coins_BP.mean(dim) - share) * math.sqrt(coins_BP.shape[dim]) / spread
        assert z.abs().max() < 6 and z.square().mean() == pytest.approx(1.0, abs=0.6)
    for index in (row, column):  # by query, and by key
        counts = torch.bincount(index, minlength=length)
        sums = torch.zeros(length, dtype=torch.float64).index_add(0, index, coins_BP.sum(0))
        z = (sums - 64 * share * counts) / (spread * (64 * counts).clamp(min=1).sqrt())
        assert z.abs().max() < 6
    wider_BLL = annealed(min(1.0, share + 0.05)).mask(length)[:, 0]
    assert (wider_BLL | ~mask_BLL).all()
    # A sample's own, in whatever company; and a prefix's is that of the whole.
    assert torch.equal(annealed(share, keys_B=KEYS_B[5:7]).mask(length)[:, 0], mask_BLL[5:7])
    assert torch.equal(annealed(share).mask(20)[:, 0], mask_BLL[:, :20, :20])


def test_annealing_goes_from_causal_to_whole_within_documents() -> None:
    inputs = torch.randn(3, 8, 2, 2, 4, generator=torch.Generator().manual_seed(2)).double()
    ends = (torch.empty(2, 0, dtype=torch.int64), ENDS_BE)
    patterns = (WholeSequence, lambda causal=False: WithinDocuments(ENDS_BE, causal=causal))
    for ends_BE, pattern in zip(ends, patterns):
        for share, causal in ((0.0, True), (1.0, False)):
            found = attention(*inputs, pattern=annealed(share, keys_B=KEYS_B[:2], ends_BE=ends_BE))
            torch.testing.assert_close(found, attention(*inputs, pattern=pattern(causal=causal)))
    half = annealed(0.5, keys_B=KEYS_B[:2], ends_BE=ENDS_BE)
    documents_BL = documents_of(ENDS_BE, 8)
    same = documents_BL[:, :, None] == documents_BL[:, None]
    whole = annealed(0.5, keys_B=KEYS_B[:2], ends_BE=ends[0]).mask(8)[:, 0]
    assert torch.equal(half.mask(8)[:, 0], whole & same)


@pytest.mark.parametrize("ends_BE", [None, ENDS_BE, ENDS_BE[:, :2]], ids=["none", "three", "two"])
@pytest.mark.parametrize("hidden", [None, 0, 2**32])
def test_a_context_s_width_tells_what_it_holds(ends_BE: Tensor | None, hidden: int | None) -> None:
    packed_BK = packed_context(KEYS_B[:2], ends_BE, hidden=hidden)
    for context_BK in (packed_BK, packed_BK.flatten().view(2, -1)):
        keys_B, pattern = Context.unpacked(context_BK, causal=False)
        assert torch.equal(keys_B, KEYS_B[:2])
        kinds = (WholeSequence, WithinDocuments) if hidden is None else (Annealed, Annealed)
        assert type(pattern) is kinds[ends_BE is not None]
        if isinstance(pattern, Annealed):
            assert pattern.hidden_B.tolist() == [hidden] * 2
        if ends_BE is not None:
            found = documents_of(pattern.ends_BE, 8)
            assert torch.equal(found, documents_of(ends_BE, 8))


def test_the_mask_is_made_once_a_pass() -> None:
    """By the first layer that asks; the others take it."""
    graph, layout = make_graph("absorb", 50), initialize_layout()
    network = small_network(graph, layout, scaled=True, num_layers=3)
    (noisy_BL, sigma_B, keys_B), *_ = noisy_batch(graph, batch=2, length=12)
    ends_BE = torch.tensor([[5, 12], [3, 12]])
    made = []
    for calls in (1, 2):
        with TorchFunctions() as seen:
            for _ in range(calls):
                network.head_input((noisy_BL, sigma_B, packed_context(keys_B, ends_BE)))
        made.append(seen.names.count("searchsorted"))
    assert made == [1, 2]


class TorchFunctions(TorchFunctionMode):
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def of_several_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What kernels for documents do: runs of [total, h, D] between the bounds, each by itself."""
    assert bounds_q is bounds_k and bounds_q.dtype == torch.int32
    assert bounds_q[0] == 0 and bounds_q[-1] == len(query) and longest_q == longest_k
    assert bounds_q.diff().min() >= 0 and bounds_q.diff().max() <= longest_q
    assert window_size in ((-1, -1), (-1, 0))
    causal = causal or window_size == (-1, 0)
    parts = [
        by_pytorch(*(part[begin:end, None] for part in (query, key, value)), causal=causal)
        for begin, end in itertools.pairwise(bounds_q.tolist())
        if begin < end
    ]
    return torch.cat(parts).squeeze(1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_kernels_for_documents_are_told_them(
    monkeypatch: pytest.MonkeyPatch, backend: str, causal: bool
) -> None:
    """What is called in their place keeps their contract."""
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(package, "flash_attn_varlen_func", of_several_lengths, raising=False)
    monkeypatch.setattr(package, "flash_attn_func", None, raising=False)
    monkeypatch.setattr(module, "flash_attention_available", lambda device: True)
    monkeypatch.setattr(varlen, "varlen_attn", of_several_lengths)
    inputs = torch.randn(3, 8, 2, 2, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = attention(*inputs, pattern=WithinDocuments(ENDS_BE, causal=causal), backend=backend)
    torch.testing.assert_close(found, alone(*inputs, causal=causal), rtol=0.02, atol=0.02)


def test_pytorchs_kernel_for_documents_takes_what_it_is_given() -> None:
    """Names and kinds of its arguments in the installed torch."""
    names = inspect.signature(varlen.varlen_attn).parameters
    assert list(names)[:7] == [
        *("query", "key", "value", "cu_seq_q", "cu_seq_k"),
        *("max_q", "max_k"),
    ]
    assert "window_size" in names
    assert torch.ops.torch_attn._varlen_attn.default in costly()


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "installed", "documents", "chosen"),
    [
        (torch.bfloat16, "cpu", 9, True, True, "sdpa"),
        (torch.float32, "cuda", 9, True, True, "sdpa"),
        (torch.bfloat16, "cuda", 9, True, False, "sdpa"),
        (torch.bfloat16, "cuda", 8, True, False, "flash"),
        (torch.bfloat16, "cuda", 8, False, False, "sdpa"),
        (torch.bfloat16, "cuda", 9, True, True, "flash"),
        (torch.float16, "cuda", 10, False, True, "varlen"),
    ],
)
def test_the_backend_follows_device_and_documents(
    dtype: torch.dtype,
    device: str,
    capability: int,
    installed: bool,
    documents: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "is_installed", lambda package: installed)
    monkeypatch.setattr(module, "_flash_attn_imports", lambda: True)
    monkeypatch.setattr(module, "_major_capability", lambda device: capability)
    found = module.choose_backend(dtype, torch.device(device), with_documents=documents)
    assert found == chosen


def test_flash_attn_for_another_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for function in (module.is_installed, module._flash_attn_imports):
        function.cache_clear()
    with pytest.raises(ConfigError, match=r"undefined symbol: _ZN3c10.*model\.attention=sdpa"):
        module.choose_backend(torch.bfloat16, torch.device("cuda"), with_documents=True)
    module.is_installed.cache_clear()


def test_packages_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network's file system a look takes milliseconds, and every layer asks."""
    module.is_installed.cache_clear()
    looks: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", looks.append)  # finds nothing
    for _ in range(3):
        module.flash_attention_available(torch.device("cuda"))
    assert looks == ["flash_attn"]
    module.is_installed.cache_clear()


def test_ends_are_where_positions_count_up() -> None:
    tokens_BL = torch.tensor([[5, 9, 3, 9, 9, 1], [9, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 9]])
    ends_BE = document_ends(tokens_BL, 9)
    assert ends_BE.tolist() == [[2, 4, 5, 6], [1, 6, 6, 6], [6, 6, 6, 6]]
    assert documents_of(ends_BE, 6).tolist() == [
        [0, 0, 1, 1, 2, 3],
        [0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ]
    assert document_bounds(ends_BE, 6).tolist() == [0, 2, 4, 5, 6, 7, *[12] * 3, *[18] * 4]


def test_bounds_are_found_without_waiting_for_a_device() -> None:
    """Nothing of a layer's arithmetic needs a number from the device: tensors without any do."""
    with FakeTensorMode():
        inputs = torch.empty(3, 8, 2, 2, 4)
        ends_BE = torch.empty(2, 3, dtype=torch.int64)
        assert attention(*inputs, pattern=WithinDocuments(ends_BE)).shape == (8, 2, 2, 4)
        assert document_bounds(ends_BE, 8).shape == (7,)
