"""Why a step's loss or gradient is not finite: which weight, which layer, or the exponential.

Called after a step whose update was skipped. The masters have not changed since; the working
weights have been refreshed from them. A bad master is therefore still visible on the rank that owns
it. A bad working weight alone has been overwritten and cannot be found.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sedd_scale.engine.fragments import ZeroFragments
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.agreement import gathered


class Fault(NamedTuple):
    """Something not finite that one rank found; the least of all ranks' faults came first."""

    kind: int
    """0 a master, 1 a working weight, 2 what a layer makes, 3 a loss."""
    stage: int
    """Pipeline stage."""
    rank: int
    text: str


def explain_failure(
    network: nn.Module,
    fragments: ZeroFragments,
    evaluate: Callable[[], Tensor],
    *,
    loss_was_finite: bool,
) -> str:
    """One clause that names the rank, the pipeline stage and the first thing that is not finite.

    Collective: every rank calls it and gets the same words.

    Args:
        network: this rank's layers, those of the list with a `logical_name`.
        evaluate: runs the step's batch forwards through all stages; losses in nats of this rank's
            sequences, on every stage.
        loss_was_finite: in the step itself.
    """
    layout = fragments.layout
    layers, losses = _layers_not_finite(network, evaluate)
    faults = []
    for kind, held in enumerate((_master, _working)):
        weights = [
            logical.name
            for logical in fragments.parameters
            if not torch.isfinite(held(logical, fragments)).all()
        ]
        if weights:
            faults.append((kind, f"weight {weights[0]} ({len(weights)} in all) is not finite"))
    if layers:
        faults.append((2, f"the hidden states that {layers[0]} makes are not finite"))
    if layout.is_last_stage and not torch.isfinite(losses).all():
        faults.append(
            (
                3,
                "the score entropy overflows: a score e^u is too large for float32, from finite "
                "weights and hidden states",
            )
        )
    mine = [Fault(kind, layout.pipeline_rank, layout.rank, text) for kind, text in faults]
    found = [fault for faults_of_rank in gathered(mine) for fault in faults_of_rank]
    if not found and not loss_was_finite:
        return (
            "made again its loss is finite: a working weight was not its master's, which has "
            "replaced it, or a device miscounted"
        )
    if not found:
        return "the gradient overflows in the backward pass: weights and losses are finite"
    first = min(found)
    return f"on rank {first.rank}, pipeline stage {first.stage}, {first.text}"


def _master(logical: LogicalParameter, fragments: ZeroFragments) -> Tensor:
    """What this rank updates of the parameter in float32; maybe nothing."""
    master = fragments.get(logical, "master")
    return torch.empty(0) if master is None else master.flat


def _working(logical: LogicalParameter, _: ZeroFragments) -> Tensor:
    """What this rank computes with; empty under ZeRO 3."""
    return torch.empty(0) if logical.shard is None else logical.shard


def _layers_not_finite(
    network: nn.Module, evaluate: Callable[[], Tensor]
) -> tuple[list[str], Tensor]:
    """Names of the layers whose outputs were not all finite, in order, and the losses."""
    names: list[str] = []

    def look(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all(torch.isfinite(part).all() for part in parts if isinstance(part, Tensor)):
            names.append(str(layer.logical_name))

    layers = [layer for layer in network.modules() if hasattr(layer, "logical_name")]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        losses = evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    return names, losses
