"""The model of a step's time: its bytes are counted, its parts move as they must."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_scale.config import Config, TrunkShape, load_config
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model import compiled, fused
from sedd_scale.model.dropout import dropout
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning import plan
from sedd_scale.planning.step_time import (
    DEVICES,
    LAUNCHES_PER_BLOCK,
    StepTime,
    block_bytes,
    step_time,
)
from tests.model.small_network import noisy_batch, small_network
from tests.repository import CONFIGS

SIZES = {"vocab_size": 50257, "block_length": 1024}
LENGTH, BATCH, WIDTH = 256, 8, 512
# Vectors of a sequence, hashes of rows and sums over positions, beside [L, B, H].
SMALL = 0.03


def predicted(name: str, gpus: int, *overrides: str, device: str = "h100") -> StepTime:
    config = load_config(CONFIGS / f"runs/openwebtext_{name}.yaml", overrides)
    planned = plan(config, gpus, **SIZES)
    return step_time(config, planned, **SIZES, device=DEVICES[device], peak=989e12)


def moved(function: Any, *arguments: Any) -> float:
    """Bytes of the tensors that go in and come out, per position and channel."""
    results = function(*arguments)
    tensors = [part for part in (*arguments, *results) if isinstance(part, Tensor)]
    distinct = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.nbytes for tensor in distinct.values()) / (LENGTH * BATCH * WIDTH)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_bytes_are_those_that_the_passes_take_and_give(residual: torch.dtype, rate: float) -> None:
    """Inputs and outputs of every pass as a GPU makes it."""
    bf16 = torch.bfloat16
    stream = torch.randn(LENGTH, BATCH, WIDTH).to(residual)
    update, vector = torch.randn(LENGTH, BATCH, WIDTH).to(bf16), torch.randn(BATCH, WIDTH)
    bias, gate = torch.randn(WIDTH).to(bf16), vector.to(residual)
    keys = torch.arange(BATCH)
    drops = dropout(keys, length=LENGTH, width=WIDTH, rate=rate, site=0, first_position=0)
    hashes = drops[1:] if rate else ()
    same = residual == bf16
    _, kept, rstd = fused._norm_forward(stream, vector, vector, 1e-5, bf16, same, True)
    weight, stream_bytes = 2, residual.itemsize
    trunk = TrunkShape(WIDTH, 8, 8, WIDTH // 8, 4 * WIDTH)
    passes = block_bytes(trunk, residual=stream_bytes, weight=weight)
    model = {name: size / WIDTH for name, size in passes.items()}

    norms = 2 * moved(fused._norm_forward, stream, vector, vector, 1e-5, bf16, same, True)
    assert norms == pytest.approx(model["norms forward"], rel=SMALL)
    of_stream = (stream, kept) if same else (kept, None)
    back = (update, stream.clone(), *of_stream, rstd, vector, residual, True)
    norms = 2 * moved(fused._norm_backward, *back)
    assert norms == pytest.approx(model["norms backward"], rel=SMALL)
    given = [(gate, one, False, rate, *hashes) for one in (None, bias)]
    gates = sum(moved(fused._gate_forward, stream, update, *one) for one in given)
    assert gates == pytest.approx(model["gates forward"], rel=SMALL)
    gates = sum(moved(fused._gate_backward, stream, update, *one) for one in given)
    assert gates == pytest.approx(model["gates backward"], rel=SMALL)
    inner, wide = update.repeat(1, 1, 4), bias.repeat(4)
    gelu = moved(lambda *a: (fused._gelu_forward(*a),), inner, wide)
    gelu += moved(fused._gelu_backward, inner.clone(), inner, wide)
    assert gelu == pytest.approx(model["activation"], rel=SMALL)


class Launches(TorchDispatchMode):
    """Operations that a GPU would start a kernel for; a compiled pass is its kernels."""

    VIEWS = frozenset(
        (
            *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "view"),
            *("permute", "select", "slice", "split", "squeeze", "unsqueeze", "t", "transpose"),
            *("unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        )
    )
    # A kernel, the sum of what its programs found, and its type; of two gates one has a bias.
    KERNELS: ClassVar = {"_norm_backward": 2, "_gate_backward": 4, "_gelu_backward": 3}

    def __init__(self) -> None:
        super().__init__()
        self.number, self.within = 0, False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.within and function.overloadpacket.__name__ not in self.VIEWS:
            self.number += 1
        return function(*args, **(kwargs or {}))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.number += self.KERNELS.get(function.__name__, 1)
            self.within = True
            try:
                return function(*arguments)
            finally:
                self.within = False

        return run


def test_launches_of_a_block_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, counted at the dispatcher; the rest of a network is subtracted."""
    mode, graph, layout = Launches(), make_graph("absorb", 50), initialize_layout()
    monkeypatch.setattr(compiled, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(compiled, "compiles_kernels", lambda: True)
    monkeypatch.setattr(compiled, "_compiled", mode.compiled)
    monkeypatch.setattr(fused, "_kernel_of", lambda function, _: mode.compiled(function))
    counted = []
    for blocks in (2, 4):
        network = small_network(graph, layout, scaled=True, num_layers=blocks, dropout=0.1)
        inputs, targets, _ = noisy_batch(graph)
        network.to(torch.bfloat16)
        network(inputs, targets).backward()  # hashes of sites and tables of angles are made once
        network.zero_grad()
        mode.number = 0
        with mode:
            network(inputs, targets).backward()
        counted.append(mode.number)
    assert (counted[1] - counted[0]) / 2 == pytest.approx(LAUNCHES_PER_BLOCK, rel=0.1)


def test_parts_add_up_and_utilisation_is_of_the_required_work() -> None:
    config = load_config(CONFIGS / "runs/openwebtext_small.yaml")
    planned = plan(config, 8, **SIZES)
    found = predicted("small", 8)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.tokens_per_second == pytest.approx(512 * 1024 / found.seconds)
    assert found.mfu == pytest.approx(planned.flops.required / (8 * found.seconds * 989e12))
    assert found.limit in found.parts and 0 < found.mfu < 0.7


def test_what_is_added_costs_time_and_what_is_faster_takes_less() -> None:
    plain = predicted("xl", 32)
    again = predicted("xl", 32, "parallel.recompute_every=1")
    assert again.parts["products"] == pytest.approx(4 / 3 * plain.parts["products"])
    split = predicted("xl", 32, "parallel.tensor=2")
    assert plain.parts["tensor ranks"] == 0.0 < split.parts["tensor ranks"]
    assert predicted("xl", 32, device="h200").seconds < plain.seconds
    wide = predicted("xl", 32, "model.residual_dtype=fp32")
    assert wide.parts["passes over memory"] > plain.parts["passes over memory"]
    stages = predicted("xl", 32, "parallel.pipeline=2", "training.micro_batch=4")
    assert stages.parts["pipeline's bubble"] > 0
    slow = dataclasses.replace(DEVICES["h100"], launch=1e-3)
    config = Config().override("training.precision=bf16", "training.global_batch=8")
    planned = plan(config, 1, **SIZES)
    bound = step_time(config, planned, **SIZES, device=slow, peak=989e12)
    assert bound.limit == "launches that the device waits for"


@pytest.mark.parametrize("gpus", [1, 8, 64, 512, 4096])
def test_every_number_of_gpus_has_a_prediction(gpus: int) -> None:
    batch = max(512, 8 * gpus)
    found = predicted("small", gpus, f"training.global_batch={batch}", "training.micro_batch=8")
    assert 0 < found.mfu < 0.7 and found.tokens_per_second > 0
