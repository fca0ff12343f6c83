"""Why a step's loss or gradient is not finite: which weight, which layer, or the exponential.

Looked for only after such a step, whose update DeepSpeed has left out, so that the weights are
still those that made it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.fragments import ZeroFragments
from sedd_scale.parallel.layout import Layout


class Fault(NamedTuple):
    """Something not finite that one rank found; the least of all ranks' faults came first."""

    kind: int
    """0 a weight, 1 what a layer makes, 2 a loss."""
    stage: int
    """Pipeline stage."""
    rank: int
    text: str


def explain_failure(
    network: nn.Module,
    parameters: Sequence[LogicalParameter],
    fragments: ZeroFragments,
    layout: Layout,
    evaluate: Callable[[], Tensor],
) -> str:
    """One clause that names the rank, the pipeline stage and the first thing that is not finite.

    Collective: every rank calls it and gets the same words.

    Args:
        network: this rank's layers, those of the list with a `logical_name`.
        evaluate: runs the step's batch forwards through all stages; losses in nats of this rank's
            sequences, on every stage.
    """
    weights = [
        logical.name
        for logical in parameters
        if not all(torch.isfinite(part).all() for part in _held(logical, fragments))
    ]
    layers, losses = _layers_not_finite(network, evaluate)
    faults = []
    if weights:
        faults.append((0, f"weight {weights[0]} ({len(weights)} in all) is not finite"))
    if layers:
        faults.append((1, f"the hidden states that {layers[0]} makes are not finite"))
    if layout.is_last_stage and not torch.isfinite(losses).all():
        faults.append(
            (
                2,
                "the score entropy overflows: a score e^u is too large for float32, from finite "
                "weights and hidden states",
            )
        )
    mine = [Fault(kind, layout.pipeline_rank, layout.rank, text) for kind, text in faults]
    of_ranks: list[list[Fault]] = [[] for _ in range(layout.world_size)]
    dist.all_gather_object(of_ranks, mine)
    found = [fault for faults_of_rank in of_ranks for fault in faults_of_rank]
    if not found:
        return "the gradient overflows in the backward pass: weights and losses are finite"
    first = min(found)
    return f"on rank {first.rank}, pipeline stage {first.stage}, {first.text}"


def _held(logical: LogicalParameter, fragments: ZeroFragments) -> Iterator[Tensor]:
    """The parameter as far as this rank holds it: to compute with, and to update in float32."""
    yield logical.parameter.detach()  # empty under ZeRO 3
    master = fragments.get(logical, "master")
    if master is not None:
        yield master.flat


def _layers_not_finite(
    network: nn.Module, evaluate: Callable[[], Tensor]
) -> tuple[list[str], Tensor]:
    """Names of the layers whose outputs were not all finite, in order, and the losses."""
    names: list[str] = []

    def look(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            names.append(str(layer.logical_name))

    layers = [layer for layer in network.modules() if hasattr(layer, "logical_name")]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        losses = evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    return names, losses
