"""Kernels of backward passes: against their definitions, and compiled for GPUs."""

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_scale.model.dropout import keep_mask
from tests.interpreted import run_interpreted
from tests.model.backward_kernels_worker import CASES, Case
from tests.model.small_network import relative

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    """What the kernels found under Triton's interpreter."""
    worker = Path(__file__).with_name("backward_kernels_worker.py")
    return dict(zip(CASES, run_interpreted(worker, tmp_path_factory.mktemp("found"))))


def norm(
    grad: Tensor,
    beside: Tensor | None,
    kept: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    scale: Tensor,
    _: torch.dtype,
    centred: bool,
) -> tuple[Tensor, ...]:
    """Of a norm without scale whose output is n, the gradient of g = grad * scale.

    (g - mean of g - n * mean of g n) / deviation, means over channels; without the mean of g where
    none is taken off the stream.
    """
    normed = kept if mean is None else (kept - mean) * rstd
    scaled = grad * scale
    along = (scaled * normed).mean(-1, keepdim=True)
    level = scaled.mean(-1, keepdim=True) if centred else 0.0
    of_stream = (scaled - level - normed * along) * rstd
    of_stream = of_stream if beside is None else of_stream + beside
    sums = ((grad * normed).sum(-3), grad.sum(-3))
    return of_stream, *(total.view(scale.shape) for total in sums)


def gate(
    grad: Tensor,
    update: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    _: bool,
    rate: float,
    *hashes: Tensor,
) -> tuple[Tensor | None, ...]:
    """By autograd, of gate * what dropout leaves of update + bias."""
    leaves = [leaf for leaf in (update, gate, bias) if leaf is not None]
    with torch.enable_grad():
        update, gate, *rest = (leaf.clone().requires_grad_() for leaf in leaves)
        dropped = update + rest[0] if rest else update
        if rate:
            dropped = torch.where(keep_mask(rate, *hashes), dropped, 0.0)
        found = torch.autograd.grad(gate * dropped, [update, gate, *rest], grad)
    return (*found, None)[:3]


def gelu(grad: Tensor, inner: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """By autograd, of the GELU of inner + bias."""
    with torch.enable_grad():
        leaves = [inner.clone().requires_grad_(), bias.clone().requires_grad_()]
        result = F.gelu(leaves[0] + leaves[1], approximate="tanh")
        return torch.autograd.grad(result, leaves, grad)


DEFINITIONS: dict[str, Any] = {"norm": norm, "gate": gate, "gelu": gelu}


def check(case: Case, found: tuple[Tensor | None, ...]) -> None:
    """Against the definition in float64."""
    wide = (
        part.double() if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in case.arguments()
    )
    for one, exact in zip(found, DEFINITIONS[case.name](*wide), strict=True):
        if exact is None:
            assert one is None
            continue
        # A rounding of the result, which sums of some thousand terms in float32 stay below. The
        # interpreter cuts digits off instead.
        rounding = 2**-7 if one.dtype == torch.bfloat16 else 1e-5
        assert relative(one.cpu(), exact) < rounding


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_is_the_definition(case: Case, interpreted: dict[Case, Any]) -> None:
    check(case, interpreted[case])
    assert interpreted[case][0].dtype == (case.stream if case.name == "norm" else case.weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_on_a_gpu_is_the_definition(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = tuple(part.cuda() if isinstance(part, Tensor) else part for part in case.arguments())
    monkeypatch.setattr(Case, "arguments", lambda self: on_gpu)
    found = case.found()
    monkeypatch.undo()
    check(case, found)


def shapes_of_constants(name: str, width: int) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Constants and types of a kernel's other arguments, of every way in which it is called."""
    from sedd_scale.model.backward_kernels import COLUMNS, _power_of_2, shape_of_a_program

    block = _power_of_2(width) if name == "norm" else min(COLUMNS, _power_of_2(width))
    sizes: dict[str, Any] = {"WIDTH": width, **shape_of_a_program(block, positions=64)}
    whole = dict.fromkeys(("length", "batch", "groups", "rows"), "i32")
    kinds = (("*fp32", "*fp32"), ("*fp32", "*bf16"), ("*bf16", "*bf16"))
    for (stream, weights), given, drops in itertools.product(kinds, (True, False), (True, False)):
        same = stream == weights
        if name == "gelu" and same and given and drops:
            yield sizes, {**whole, **dict.fromkeys(("grad", "inner", "bias", "out"), weights)}
        elif name == "gate":
            constants = {"HAS_BIAS": given, "DROPS": drops, "THRESHOLD": -1717986919}
            constants |= {} if given else {"bias": None}
            hashes = ("factor", "offset", "channel")
            constants |= {} if drops else dict.fromkeys(hashes)
            types = dict.fromkeys(hashes, "*i32") | dict.fromkeys(("grad", "gate"), stream)
            types |= dict.fromkeys(("update", "bias", "out"), weights)
            yield {**constants, **sizes}, {**types, **whole}
        elif name == "norm" and drops:
            constants = {"HAS_STREAM": given, "OF_STREAM": same}
            constants |= {} if given else {"stream_grad": None}
            constants |= {} if same else {"mean": None}
            types = {"grad": weights, "kept": weights, "stream_grad": stream, "out": stream}
            yield {**constants, **sizes}, {**types, **whole}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [768, 4096])
@pytest.mark.parametrize("name", ["norm", "gate", "gelu"])
def test_a_kernel_compiles_for_gpus(
    name: str, width: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every shape of its constants: nothing spilled, 16 bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sedd_scale.model import backward_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(backward_kernels, f"{name}_backward_kernel")
    for constants, types in shapes_of_constants(name, width):
        names = kernel.arg_names
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if signature[name].startswith("*")
        }
        compiled = triton.compile(
            ASTSource(
                kernel,
                signature,
                {name: constants[name] for name in names if name in constants},
                aligned,
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": constants["num_warps"]},
        )
        ptx = compiled.asm["ptx"]
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 20_000
        assert ".local" not in ptx
        for access in ("ld", "st"):
            assert re.search(access + r"\.global\S*\.v4\.[bf]32", ptx), (access, types)
