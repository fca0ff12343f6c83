"""Statistics and gradient of a chunk: by their definition, and the kernels against PyTorch."""

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_scale.parallel import score_kernel, vocab
from sedd_scale.parallel.score_kernel import ChunkStatistics, Coefficients, RowColumns
from tests.interpreted import run_interpreted
from tests.model.small_network import relative
from tests.parallel.score_kernel_worker import (
    CHUNKS,
    LOSSES,
    ChunkCase,
    bias_of,
    law_of,
    make_chunk,
    run_chunk,
    run_loss,
)
from tests.tolerance import Bound, float32_bounds

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
CHUNK_IDS = [
    f"{case.num_rows}x{case.num_columns}-{'own' if case.with_own else 'all'}-{case.dtype}"
    for case in CHUNKS
]
# An entry of the gradient is an exponential of at most 32, whose argument one rounding moves by
# 32 * 2^-24 = 2e-6 of the entry.
EXPONENTIAL = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels found under Triton's interpreter."""
    found: dict[str, Any] = run_interpreted(
        Path(__file__).with_name("score_kernel_worker.py"), tmp_path_factory.mktemp("found")
    )
    return found


Picked = tuple[list[float], list[float]]


def by_definition(
    logits_mW: Tensor, columns: RowColumns, coefficients: Coefficients
) -> tuple[Picked, list[Bound], Tensor]:
    """Of each row max and target, which are exact; sum of e^(z - max) and total; the gradient."""
    picked: Picked = ([], [])
    gradient_mW = torch.zeros_like(logits_mW, dtype=torch.float64)
    for row, logits_W in enumerate(logits_mW.double()):
        target = int(columns.target[row])
        own = -1 if columns.own is None else int(columns.own[row])
        counted_W = torch.arange(len(logits_W)) != own
        kept = logits_W[counted_W]
        top = float(kept.max()) if len(kept) and kept.max() > -torch.inf else None
        picked[0].append(torch.finfo(torch.float32).min if top is None else top)
        picked[1].append(float(logits_W[target]) if target >= 0 else 0.0)
        gradient_W = coefficients.exp[row] * (logits_W - picked[0][-1]).exp()
        if columns.own is not None:
            gradient_W += coefficients.rest[row]
        if target >= 0:
            gradient_W[target] += coefficients.target[row]
        gradient_mW[row] = torch.where(counted_W, gradient_W, 0.0)
    counted_mW = torch.ones_like(logits_mW, dtype=torch.bool)
    if columns.own is not None:
        counted_mW = torch.arange(logits_mW.shape[1]) != columns.own[:, None]

    def sums(logits_mW: Tensor, max_m1: Tensor) -> list[Tensor]:
        exp_mW = torch.where(counted_mW, logits_mW - max_m1, -torch.inf).exp()
        return [exp_mW.sum(1), torch.where(counted_mW, logits_mW, 0.0).sum(1)]

    bounds = float32_bounds(sums, logits_mW, torch.tensor(picked[0])[:, None])
    return picked, bounds, gradient_mW


def with_bias(case: ChunkCase) -> tuple[Tensor, RowColumns, Coefficients]:
    """The chunk with its bias added."""
    logits_mW, columns, coefficients = make_chunk(case)
    bias_W = bias_of(case)
    return logits_mW if bias_W is None else logits_mW + bias_W, columns, coefficients


def check_sums(statistics: ChunkStatistics, bounds: list[Bound]) -> None:
    for found, bound in zip((statistics.sum_exp, statistics.total), bounds):
        if found is not None:
            assert found.dtype == torch.float32
            bound.check(found)


@pytest.mark.parametrize("case", CHUNKS, ids=CHUNK_IDS)
def test_statistics_and_gradient_are_the_definitions(case: ChunkCase) -> None:
    picked, bounds, expected_gradient = by_definition(*with_bias(case))
    statistics, gradient, sums_W, _ = run_chunk(case)
    assert gradient.dtype == case.dtype
    assert (statistics.total is not None) == case.with_own
    for part, numbers in zip((statistics.max, statistics.target), picked):
        assert torch.equal(part, torch.tensor(numbers))
    check_sums(statistics, bounds)
    close = EXPONENTIAL if case.dtype == torch.float32 else EXPONENTIAL | {"rtol": 2**-8}
    torch.testing.assert_close(gradient.double(), expected_gradient, **close)
    torch.testing.assert_close(sums_W.double(), expected_gradient.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CHUNKS, ids=CHUNK_IDS)
def test_sums_and_gradient_of_the_law_are_the_definitions(case: ChunkCase) -> None:
    if case.with_own:
        check_law(case, run_chunk(case).law)


def check_law(case: ChunkCase, found: tuple[Tensor, ...] | None) -> None:
    """Of w = scale * e^(z - max), in float64; the gradient was rounded to bfloat16 at the end."""
    assert found is not None
    logits_mW, columns, _ = with_bias(case)
    scale_m, coefficients = law_of(case)
    assert columns.own is not None
    counted_mW = torch.arange(case.num_columns) != columns.own[:, None]
    z_mW = torch.where(counted_mW, logits_mW.double(), -torch.inf)
    top_m = z_mW.amax(1).clamp_min(torch.finfo(torch.float32).min)
    w_mW = scale_m.double()[:, None] * (z_mW - top_m[:, None]).exp()
    slope_mW = coefficients.w[:, None] - coefficients.share[:, None] / (1 + w_mW)
    gradient_mW = w_mW * slope_mW
    for row, (target, own) in enumerate(zip(columns.target.tolist(), columns.own.tolist())):
        if target >= 0:
            gradient_mW[row, target] += coefficients.target[row]
        if own >= 0:
            gradient_mW[row, own] = coefficients.own[row]
    log_total_m, share_total_m, found_mW, sums_W = (part.double() for part in found)
    torch.testing.assert_close(log_total_m, w_mW.log1p().sum(1), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(share_total_m, (w_mW / (1 + w_mW)).sum(1), rtol=1e-5, atol=1e-30)
    # The two terms of a slope may cancel: as close as the terms are, beside the rounding (2^-7).
    terms_mW = w_mW * (coefficients.w.abs() + coefficients.share.abs())[:, None] + 1.0
    assert ((found_mW - gradient_mW).abs() <= 2**-7 * gradient_mW.abs() + 2e-5 * terms_mW).all()
    assert ((sums_W - gradient_mW.sum(0)).abs() <= 2e-5 * terms_mW.sum(0)).all()


@needs_triton
@pytest.mark.parametrize("index", range(len(CHUNKS)), ids=CHUNK_IDS)
def test_the_kernels_do_what_pytorch_does(index: int, interpreted: dict[str, Any]) -> None:
    case = CHUNKS[index]
    statistics, gradient, sums_W, law = interpreted["chunks"][index]
    expected, expected_gradient, expected_sums_W, _ = run_chunk(case)
    assert (statistics.total is None) == (expected.total is None)
    assert torch.equal(statistics.max, expected.max)
    assert torch.equal(statistics.target, expected.target)
    check_sums(statistics, by_definition(*with_bias(case))[1])
    assert gradient.dtype == case.dtype
    # In bfloat16 rounded once (the interpreter cuts the digits off).
    close = EXPONENTIAL if case.dtype == torch.float32 else EXPONENTIAL | {"rtol": 2**-7}
    torch.testing.assert_close(gradient.float(), expected_gradient.float(), **close)
    torch.testing.assert_close(sums_W, expected_sums_W, rtol=1e-5, atol=1e-5)
    if case.with_own:
        check_law(case, law)


@needs_triton
@pytest.mark.parametrize("index", range(len(LOSSES)), ids=["-".join(map(str, k)) for k in LOSSES])
def test_the_loss_through_the_kernels_is_the_same(index: int, interpreted: dict[str, Any]) -> None:
    compare_losses(interpreted["losses"][index], run_loss(*LOSSES[index]), LOSSES[index][2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_triton
@pytest.mark.parametrize(("name", "scaled", "dtype"), LOSSES)
def test_on_a_gpu_the_kernels_lose_what_pytorch_does(
    name: str, scaled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_loss(name, scaled, dtype, "cuda")
    monkeypatch.setattr(score_kernel, "has_kernel", lambda table_mW: False)
    monkeypatch.setattr(vocab, "has_kernel", lambda table_mW: False)
    compare_losses(found, run_loss(name, scaled, dtype, "cuda"), dtype)


def compare_losses(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """Two programs of one definition, which bounds each to 2e-6 of a result (`test_vocab`).

    In bfloat16 a gradient of the logits is rounded, or has its digits cut off (2^-7), and so is
    what is made of it (2^-8), which no processor does better. The kernels add the bias after the
    product is rounded, PyTorch before: logits differ by a rounding, and losses by as much of them.
    """
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for kind in ("mean", "sequence"):
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
        torch.testing.assert_close(found[kind][0], expected[kind][0], rtol=rounding, atol=0.0)
        for part, same in zip(found[kind][1:], expected[kind][1:]):
            assert part.dtype == dtype
            assert relative(part, same) < tolerance


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("logits", "weights"), [("*fp32", "*fp32"), ("*fp32", "*bf16"), ("*bf16", "*bf16")]
)
def test_the_kernels_compile_for_gpus(
    logits: str,
    weights: str,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every shape of their constants, to machine code; the interpreter accepts more.

    Held besides: no register goes to memory, shared memory is what sums over a block need, and the
    unmasked blocks are read and written 16 bytes at a time, at GPT-2's 50,257 columns too.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sedd_scale.parallel.score_kernel_triton import (
        gradient_kernel,
        law_kernel,
        statistics_kernel,
    )

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"target": "*i64", "own": "*i64"}
    types |= dict.fromkeys(("row_stride", "out_stride", "num_rows", "num_columns"), "i32")
    sizes = {"ROWS": score_kernel.GRADIENT_ROWS, "LOWEST": score_kernel._LOWEST}
    # What comes in is float32, or bfloat16 where a product cannot hand out more.
    types |= {"logits": logits, "bias": weights, "out": weights}
    for kernel, block, wide in (
        (statistics_kernel, score_kernel.STATISTICS_BLOCK, (r"ld\.global\.v4",)),
        (law_kernel, score_kernel.STATISTICS_BLOCK, (r"ld\.global\.v4",)),
        (gradient_kernel, score_kernel.GRADIENT_BLOCK, (r"ld\.global\.v4", r"st\.global\.v")),
    ):
        for with_bias, with_own, of_law in itertools.product([True, False], repeat=3):
            if (of_law and not with_own) or (kernel is law_kernel and not of_law):
                continue
            constants: dict[str, Any] = {"HAS_BIAS": with_bias, "HAS_OWN": with_own, **sizes}
            constants |= {"BLOCK": block, "OF_LAW": of_law}
            constants |= {} if with_bias else {"bias": None}
            constants |= {} if with_own else {"own": None}
            constants |= {} if of_law else {"own_coefficient": None}
            names = kernel.arg_names
            signature = {
                name: "constexpr" if name in constants else types.get(name, "*fp32")
                for name in names
            }
            # As the launcher finds them: addresses and row strides are multiples of 16.
            aligned = {
                (place,): [["tt.divisibility", 16]]
                for place, name in enumerate(names)
                if signature[name] != "constexpr" and name not in ("num_rows", "num_columns")
            }
            given = {name: constants[name] for name in names if name in constants}
            compiled = triton.compile(
                ASTSource(kernel, signature, given, aligned),
                target=GPUTarget("cuda", capability, 32),
                options={"num_warps": score_kernel.NUM_WARPS},
            )
            ptx = compiled.asm["ptx"]
            assert compiled.asm["cubin"] and compiled.metadata.shared <= 8192
            assert ".local" not in ptx
            assert all(re.search(access, ptx) for access in wide), (kernel, with_bias, with_own)
