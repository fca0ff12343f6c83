"""The kernel of a norm's backward pass: against its definition, and compiled for GPUs."""

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreted import run_interpreted
from tests.model.norm_kernel_worker import CASES, NormCase
from tests.model.small_network import relative

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[NormCase, Any]:
    """What the kernel found under Triton's interpreter."""
    found = run_interpreted(
        Path(__file__).with_name("norm_kernel_worker.py"), tmp_path_factory.mktemp("found")
    )
    return dict(zip(CASES, found))


def by_definition(arguments: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """In float64; of a norm without scale whose output is n, the gradient of g = grad * scale.

    (g - mean of g - n * mean of g n) / deviation, means over channels.
    """
    grad, beside, kept, mean, rstd, scale = (
        torch.zeros(()) if one is None else one for one in arguments
    )
    grad, normed, rstd = grad.double(), kept.double(), rstd.double()
    if arguments[3] is not None:
        normed = (normed - mean.double()) * rstd
    scaled = grad * scale.double()
    along = (scaled * normed).mean(-1, keepdim=True)
    of_stream = (scaled - scaled.mean(-1, keepdim=True) - normed * along) * rstd
    sums = ((grad * normed).sum(-3), grad.sum(-3))
    return of_stream + beside.double(), *(total.view(scale.shape) for total in sums)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_definition(case: NormCase, interpreted: dict[NormCase, Any]) -> None:
    """Gradients of the stream, the scale and the shift, against float64."""
    expected = by_definition(case.arguments())
    for found, exact in zip(interpreted[case], expected):
        # A rounding of the result, which sums of some thousand terms in float32 stay below.
        rounding = 2**-8 if found.dtype == torch.bfloat16 else 1e-5
        assert relative(found.double(), exact) < rounding
    assert interpreted[case][0].dtype == case.stream


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_on_a_gpu_is_the_definition(case: NormCase) -> None:
    from sedd_scale.model.norm_kernel import norm_backward

    arguments = case.arguments()
    on_gpu = [None if one is None else one.cuda() for one in arguments]
    found = norm_backward(*on_gpu, case.stream)  # type: ignore[arg-type]
    for one, exact in zip(found, by_definition(arguments)):
        rounding = 2**-8 if one.dtype == torch.bfloat16 else 1e-5
        assert relative(one.cpu().double(), exact) < rounding


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [768, 4096])
def test_the_kernel_compiles_for_gpus(
    width: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every shape of its constants: nothing spilled, 16 bytes at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sedd_scale.model.norm_kernel import norm_backward_kernel, shape_of_a_program

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = shape_of_a_program(width, positions=64)
    num_warps = shape.pop("num_warps")
    kinds = (("*fp32", "*fp32"), ("*fp32", "*bf16"), ("*bf16", "*bf16"))
    for (stream, weights), given in itertools.product(kinds, (True, False)):
        same = stream == weights
        types = {"length": "i32", "batch": "i32", "groups": "i32", "grad": weights, "kept": weights}
        types |= {"stream_grad": stream, "out": stream}
        constants: dict[str, Any] = {"POSITIONS": 64, "HAS_STREAM": given, "OF_STREAM": same}
        constants |= {"WIDTH": width, **shape}
        constants |= {} if given else {"stream_grad": None}
        constants |= {} if same else {"mean": None}
        names = norm_backward_kernel.arg_names
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
                norm_backward_kernel,
                signature,
                {name: constants[name] for name in names if name in constants},
                aligned,
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps},
        )
        ptx = compiled.asm["ptx"]
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 20_000
        assert ".local" not in ptx
        wide = r"global\S*\.v4\.b32" if "bf16" in weights else r"global\S*\.v4\.[bf]32"
        assert re.search("ld." + wide, ptx) and re.search("st." + wide, ptx), (stream, weights)
