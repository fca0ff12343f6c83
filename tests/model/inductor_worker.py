"""The Triton code that Inductor makes of the compiled passes for an H100, on any machine.

    python inductor_worker.py FILE

A process of its own: PyTorch is told of a GPU that is not there. For each pass FILE has the number
of its kernels, how many shapes each that reduces may be run in, and the bytes they move per
position and channel.
"""

import contextlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    gcnArchName="sm_90",
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    l2_cache_size=50 << 20,
    is_integrated=False,
    uuid="0",
    pci_bus_id=0,
)
LENGTH, BATCH, WIDTH, HEAD = 1024, 32, 768, 64


class Driver:
    """Triton's, of a GPU on which nothing runs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> None: ...


def pretend() -> None:
    """Let PyTorch believe in one H100."""
    torch.cuda.get_device_properties = lambda *_: H100  # type: ignore
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0  # type: ignore
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_initialized = lambda: True  # type: ignore
    triton.runtime.driver.set_active(Driver())
    import torch._inductor.config as inductor
    import torch._subclasses.fake_tensor as fake
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers

    triton_helpers.set_driver_to_gpu = lambda: None  # type: ignore[assignment]
    inductor.compile_threads = 1
    inductor.fx_graph_cache = False
    fake.init_gpu_context = lambda _: None  # type: ignore
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda *_: H100)  # type: ignore
        owner.current_device = staticmethod(lambda: 0)  # type: ignore
    CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)  # type: ignore
    CudaInterface.is_available = staticmethod(lambda: True)  # type: ignore


def inductor_kernels(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What Inductor makes of a function of tensors, and how many bytes that reads and writes.

    Positions and sequences may be any number, as in training, which only a build of PyTorch with
    CUDA can follow; in another they are what they are.
    """
    from torch._dynamo.source import ConstantSource
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    sizes: dict[int, Any] = {}
    if torch.backends.cuda.is_built():
        for size in (LENGTH, BATCH):
            symbol = environment.create_symbol(
                size, ConstantSource(f"any_{size}"), DimDynamic.DYNAMIC, constraint_dim=None
            )
            sizes[size] = environment.create_symintnode(symbol, hint=size)

    def on(device: str) -> list[Any]:
        return [
            torch.empty(
                [sizes.get(size, size) for size in one.shape], dtype=one.dtype, device=device
            )
            if isinstance(one, Tensor)
            else one
            for one in arguments
        ]

    # Followed on a CPU, for a build of PyTorch without CUDA does not index tensors of a GPU.
    with mode:
        given = on("cpu")
        tensors = [one for one in on("cuda") if isinstance(one, Tensor)]

    def of_tensors(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        results = function(*(next(rest) if isinstance(one, Tensor) else one for one in given))
        made = results if isinstance(results, tuple) else (results,)
        return [result for result in made if result is not None]

    with mode, torch.no_grad():
        traced = make_fx(
            torch.func.functionalize(of_tensors, remove="mutations"),
            decomposition_table=select_decomp_table(),
            tracing_mode="symbolic" if sizes else "fake",
        )(*(one for one in given if isinstance(one, Tensor)))
    for node in traced.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    FakeTensorProp(traced, mode).propagate_dont_convert_inputs(*tensors)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph = GraphLowering(
            traced, example_inputs=tensors, shape_env=environment, is_inference=True
        )
        with V.set_graph_handler(graph):
            graph.run(*tensors)
            sources: list[str] = []
            with collected(sources):
                graph.codegen()
            num_bytes, *_ = graph.count_bytes()
    tuners = [tuner_of(source) for source in sources]
    return {
        "kernels": len(tuners),
        "shapes of reductions": [
            len(tuner.configs) for tuner in tuners if tuner.inductor_meta["num_reduction"]
        ],
        "bytes": int(num_bytes) / (LENGTH * BATCH * WIDTH),
    }


@contextlib.contextmanager
def collected(sources: list[str]) -> Any:
    """Inside, every kernel that is defined adds its source."""
    from torch._inductor.codegen.triton import TritonScheduling

    define = TritonScheduling.define_kernel

    def noting(self: Any, source: str, *rest: Any) -> Any:
        if source not in sources:
            sources.append(source)
        return define(self, source, *rest)

    TritonScheduling.define_kernel = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        TritonScheduling.define_kernel = define  # type: ignore[method-assign]


def tuner_of(source: str) -> Any:
    """The kernel with the shapes among which a device would choose by timing."""
    path = Path(sys.argv[1]).with_suffix(f".{abs(hash(source))}.py")
    path.write_text(source.replace("Placeholder.", ""))
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    (tuner,) = (one for one in namespace.values() if isinstance(one, CachingAutotuner))
    return tuner


def passes() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Compiled passes with what the small model in bf16 gives them."""
    from sedd_scale.model import compiled, dropout, fused

    compiled.on_gpu = lambda tensor: True

    def of(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    stream, vector = of(LENGTH, BATCH, WIDTH), of(BATCH, WIDTH, dtype=torch.float32)
    gate, bias, wide_bias = of(BATCH, WIDTH), of(WIDTH), of(4 * WIDTH)
    wide = of(LENGTH, BATCH, 4 * WIDTH)
    heads = of(LENGTH, BATCH, WIDTH // HEAD // 2, 4, HEAD)
    row, channel = of(LENGTH, BATCH, 1, dtype=torch.int32), of(WIDTH, dtype=torch.int32)
    drop = (False, 0.1, row, row, channel)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "norm forward": (
            fused._norm_forward,
            (stream, vector, vector, 1e-5, torch.bfloat16, True, True),
        ),
        "gate forward": (fused._gate_forward, (stream, stream, gate, None, *drop)),
        "biased gate forward": (fused._gate_forward, (stream, stream, gate, bias, *drop)),
        "GELU forward": (fused._gelu_forward, (wide, wide_bias)),
        "gated forward": (fused._gated_forward, (wide, True)),
        "norm of heads": (fused._head_norm, (heads[..., :3, :], of(3, HEAD), 1e-5)),
        "norm of heads backward": (
            fused._head_norm_backward,
            (heads[..., :3, :], heads[..., :3, :], of(3, HEAD), 1e-5),
        ),
        "row hashes": (
            dropout._row_hashes,
            tuple(of(*shape, dtype=torch.int64) for shape in ((BATCH,), (), (LENGTH,))),
        ),
    }
    found = {name: (call.__wrapped__, given) for name, (call, given) in calls.items()}
    turn = fused._turn.__wrapped__  # type: ignore[attr-defined]

    def turned(mixed_LBh3D: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pair_LBh2D = mixed_LBh3D[..., :2, :]
        turned_LBh2D = torch.empty_like(pair_LBh2D, memory_format=torch.contiguous_format)
        turn(pair_LBh2D, cos, sin, turned_LBh2D)
        return turned_LBh2D

    opens = fused._gated_backward.__wrapped__  # type: ignore[attr-defined]

    def gated(grad_LBF: Tensor, inner_LBF: Tensor) -> Tensor:
        out_LBF = torch.empty_like(inner_LBF)
        opens(grad_LBF, inner_LBF, True, out_LBF)
        return out_LBF

    found["gated backward"] = (gated, (wide[..., : 2 * WIDTH], wide))
    angles = of(LENGTH, 1, 1, 1, HEAD // 2)
    mixed = of(LENGTH, BATCH, WIDTH // HEAD, 3, HEAD)
    return {**found, "turns": (turned, (mixed, angles, angles))}


def main(path: Path) -> None:
    pretend()
    import torch._inductor.config as inductor

    control = (lambda stream: stream.float().sum(0), (torch.empty(LENGTH, BATCH, WIDTH),))
    inductor.deterministic = False
    by_timing = inductor_kernels(*control)
    inductor.deterministic = True
    found = {name: inductor_kernels(*call) for name, call in passes().items()}
    found["control by timing"], found["control"] = by_timing, inductor_kernels(*control)
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
