"""A reduction that one tensor rank sums in another order, and streams, in two real processes.

torchrun --nproc-per-node 2 drift_worker.py FOLDER
"""

import contextlib
import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config  # noqa: E402
from sedd_scale.errors import TrainingError  # noqa: E402
from sedd_scale.model import adaln, fused  # noqa: E402
from sedd_scale.parallel.layout import initialize_layout, leave_layout  # noqa: E402
from sedd_scale.training.replicas import check_replicas  # noqa: E402

SMALL = ("model.num_layers=2", "training.precision=fp32")


def run_of(*overrides: str, tensor: int = 1) -> SyntheticRun:
    arguments = Namespace(
        model="tiny",
        vocab_size=50,
        batch_size=2,
        block_length=16,
        accumulate=2,
        overrides=[*SMALL, *overrides],
    )
    config = synthetic_config(arguments, world_size=2)
    return SyntheticRun(config, initialize_layout(tensor=tensor))


def one_ulp_off(rank: int) -> None:
    """The gate's gradient on rank 1 as another order of its sum would make it."""
    backward = fused._gate_backward

    def other_order(*arguments: Any) -> Any:
        grad_update, grad_gate, grad_bias = backward(*arguments)
        up = torch.full_like(grad_gate, torch.inf)
        off = torch.nextafter(grad_gate, up) if rank == 1 else grad_gate
        return grad_update, off, grad_bias

    fused._gate_backward = other_order


def drifted(*, healed: bool) -> str:
    """What the check of replicas says after steps in which one rank is off by an ulp."""
    run = run_of("parallel.tensor=2", tensor=2)
    engine = run.engine()
    plain, own = fused._gate_backward, adaln.sum_gradient_over_sequence
    one_ulp_off(run.layout.rank)
    if not healed:
        adaln.sum_gradient_over_sequence = lambda value, layout: value
    try:
        for step in (1, 2):
            engine.train_step(run.micro_batches(step), lr=1e-3)
        check_replicas(2, engine.fragments)
    except TrainingError as error:
        return str(error)
    finally:
        fused._gate_backward, adaln.sum_gradient_over_sequence = plain, own
        leave_layout()
    return "the same"


class Stream:
    """Of an accelerator that is made to look asynchronous; notes what waits for what."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None:
        self.events.append("the host waits for a stream")


class Event:
    def record(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def asynchronous(events: list[str]) -> Iterator[None]:
    """DeepSpeed's accelerator for a CPU, with streams as CUDA's."""
    accelerator = get_accelerator()
    kind, current = type(accelerator), Stream("compute", events)
    kept = {name: kind.__dict__.get(name) for name in ("Stream", "Event")}
    kind.Stream = property(lambda self: lambda *_, **__: Stream("reduction", events))
    kind.Event = property(lambda self: lambda *_, **__: Event())
    changed = {
        "current_stream": lambda *_: current,
        "default_stream": lambda *_: current,
        "stream": lambda _: contextlib.nullcontext(),
        "resolves_data_dependency": lambda: False,
        "is_synchronized_device": lambda: False,
        "synchronize": lambda *_: events.append("the host waits for the device"),
    }
    for name, function in changed.items():
        setattr(accelerator, name, function)
    record_stream = torch.Tensor.record_stream
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.record_stream = record_stream  # type: ignore[method-assign]
        for name in changed:
            delattr(accelerator, name)
        for name, was in kept.items():
            setattr(kind, name, was)


def waits_of_a_step(*overrides: str) -> list[str]:
    """What waits for what in the second step."""
    events: list[str] = []
    with asynchronous(events):
        run = run_of(*overrides)
        engine = run.engine()
        engine.train_step(run.micro_batches(1), lr=1e-3)
        events.clear()
        engine.train_step(run.micro_batches(2), lr=1e-3)
        found = list(events)
    leave_layout()
    return found


class Late:
    """A collective that is made when it is waited for: what reads too early reads what was."""

    def __init__(self, name: str, events: list[str], collective: Callable[[], Any]) -> None:
        self.name, self.events, self.collective = name, events, collective
        events.append(f"{name} starts")

    def wait(self) -> None:
        self.events.append(f"{self.name} ends")
        with torch.no_grad():
            self.collective()


@contextlib.contextmanager
def late_exchange(events: list[str]) -> Iterator[None]:
    """Reductions and gathers of ZeRO 1 as late as they may be."""
    names = {"reduce_scatter_tensor": "reduction", "all_gather_into_tensor": "gather"}
    kept = {name: getattr(dist, name) for name in names}

    def late(name: str) -> Callable[..., Any]:
        def collective(*tensors: Any, async_op: bool = False, **options: Any) -> Any:
            if not async_op:
                return kept[name](*tensors, **options)
            return Late(names[name], events, lambda: kept[name](*tensors, **options))

        return collective

    for name in names:
        setattr(dist, name, late(name))
    try:
        yield
    finally:
        for name, was in kept.items():
            setattr(dist, name, was)


def exchange_of_steps(*overrides: str, late: bool) -> dict[str, Any]:
    """Numbers of three steps, the bound of the average, and what happened in the second step."""
    events: list[str] = []
    run = run_of(*overrides)
    engine = run.engine()
    stack = engine._deepspeed.module.stack
    for index, layer in enumerate(stack):
        layer.register_forward_pre_hook(lambda *_, index=index: events.append(f"layer {index}"))
    first = next(stack[0].parameters())
    first.register_hook(lambda _: events.append("the first layer's gradient"))
    losses = []
    with late_exchange(events) if late else contextlib.nullcontext():
        for step in (1, 2, 3):
            if step == 3:
                second = list(events)
            events.clear()
            losses.append(engine.train_step(run.micro_batches(step), lr=1e-2).numbers)
        found = {"losses": losses, "events": second}
        with engine.fragments.ema_weights():
            found["average"] = engine.evaluate(run.micro_batches(1)).tolist()
        engine.train_step(run.micro_batches(4), lr=1e-2)
        check_replicas(4, engine.fragments)
    leave_layout()
    return found


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "alone": drifted(healed=False),
        "healed": drifted(healed=True),
        "ZeRO 1": waits_of_a_step("parallel.zero_stage=1"),
        "ZeRO 2": waits_of_a_step("parallel.zero_stage=2"),
        "ZeRO 2 bf16": waits_of_a_step("parallel.zero_stage=2", "training.precision=bf16"),
    }
    for stage, precision in ((1, "bf16"), (1, "fp32"), (2, "bf16")):
        options = (f"parallel.zero_stage={stage}", f"training.precision={precision}")
        found[f"exchange of ZeRO {stage} {precision}"] = {
            "late": exchange_of_steps(*options, late=True),
            "at once": exchange_of_steps(*options, late=False),
        }
    rank = dist.get_rank()
    Path(sys.argv[1], f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
