"""Two tensor-parallel processes on the vocab-parallel loss, whole networks and layouts.

    RANK=.. WORLD_SIZE=2 python vocab_worker.py FOLDER

Each process writes what it found to FOLDER/RANK.pt; the tests put the shards together and compare
them with one process. `two_processes` starts both, once in a test session.
"""

import dataclasses
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sedd_scale.diffusion.graphs import Graph, make_graph
from sedd_scale.diffusion.row_law import row_law
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import Layout, initialize_layout, leave_layout, shutdown
from sedd_scale.parallel.vocab import (
    ScoreTargets,
    linear_score_entropy,
    linear_score_entropy_per_sequence,
    score_targets,
)
from sedd_scale.parallel.vocab_shard import VocabShard
from tests.distributed.runs import launch
from tests.model.small_network import gradients, noisy_batch, small_network

# The graph, or "mean" and "absorb mean": uniform and absorb under the mean parametrisation; and
# whether logits are scaled.
KINDS = [
    ("absorb", True),
    ("absorb", False),
    ("uniform", False),
    ("mean", False),
    ("absorb mean", True),
]


class Problem(NamedTuple):
    """A head's input, its weights (rows: all states, then padding) and a noisy batch."""

    graph: Graph
    scaled: bool
    mean: bool
    hidden_LBH: Tensor
    weight: Tensor
    bias: Tensor
    clean_BL: Tensor
    noisy_BL: Tensor
    noise_B3: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and bias, fresh and differentiable."""
        parts = (self.hidden_LBH, self.weight, self.bias)
        return tuple(part.detach().clone().requires_grad_() for part in parts)  # type: ignore

    @property
    def targets(self) -> ScoreTargets:
        """What the loss needs of the batch."""
        return score_targets(
            self.graph, clean_BL=self.clean_BL, noisy_BL=self.noisy_BL, noise_B3=self.noise_B3
        )

    def shard(self, **changes: Any) -> VocabShard:
        """All of the vocabulary in one process."""
        law = row_law(self.graph, scaled=self.scaled, mean=self.mean)
        whole = VocabShard(law, 0, self.graph.num_tokens, None)
        return dataclasses.replace(whole, **changes)


def graph_of(name: str, num_tokens: int) -> Graph:
    """The graph of one of `KINDS`."""
    return make_graph("uniform" if name == "mean" else name.split()[0], num_tokens)


def make_problem(
    name: str,
    scaled: bool,
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.float64,
    length: int = 6,
    width: int = 8,
    padding: int = 0,
    seed: int = 0,
) -> Problem:
    """Four sequences, from almost clean to almost all noise; padding columns hold nan and inf."""
    graph = graph_of(name, num_tokens)
    generator = torch.Generator().manual_seed(seed)
    sigma_B = torch.tensor([0.02, 0.5, 2.0, 6.0], dtype=torch.float64)
    rate_B = sigma_B * 3.0
    noise_B3 = torch.stack([sigma_B, rate_B, rate_B / torch.expm1(sigma_B)], 1)
    clean_BL = torch.randint(num_tokens, (4, length), generator=generator)
    move, token = torch.rand(2, 4, length, generator=generator, dtype=torch.float64)
    noisy_BL = graph.corrupt(clean_BL, sigma_B, move, token)
    rows = graph.num_states + padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, bias = normal(rows, width) / width**0.5, normal(rows)
    weight[graph.num_states :] = torch.nan
    bias[graph.num_states :] = torch.inf
    return Problem(
        graph,
        scaled,
        name.endswith("mean"),
        normal(length, 4, width).to(dtype),
        weight.to(dtype),
        bias.to(dtype),
        clean_BL,
        noisy_BL,
        noise_B3,
    )


# (graph, scaled, N): columns that split evenly and not, and ranks without a single real token.
LOSS_CASES = [(name, scaled, size) for name, scaled in KINDS for size in (2, 3, 5, 50, 101)]
# Small enough a budget that unequal shards would be cut into unequal chunks.
CHUNK_BYTES = 240


@dataclasses.dataclass(frozen=True)
class NetworkCase:
    """A network to compare between one process and two."""

    name: str
    scaled: bool
    num_tokens: int
    sequence_parallel: bool = False
    recompute_every: int = 0
    dropout: float = 0.0
    segments: int = 1

    def __str__(self) -> str:
        options = {
            "scaled": self.scaled,
            "sp": self.sequence_parallel,
            "recompute": self.recompute_every,
            "dropout": self.dropout,
            "segments": self.segments > 1,
        }
        return "-".join([self.name, str(self.num_tokens), *(k for k, on in options.items() if on)])


# Layouts (tensor, pipeline, data) of eight processes that are simulated one at a time.
SIMULATED_LAYOUTS = [(2, 2, 2), (4, 2, 1), (2, 1, 4), (1, 4, 2), (8, 1, 1), (1, 8, 1)]

NETWORK_CASES = [
    NetworkCase("absorb", True, 50),
    NetworkCase("absorb", False, 51, sequence_parallel=True),
    NetworkCase("absorb", True, 2, sequence_parallel=True),
    NetworkCase("uniform", False, 51),
    NetworkCase("uniform", False, 50, sequence_parallel=True, recompute_every=1),
    NetworkCase("uniform", False, 2),
    NetworkCase("mean", False, 51),
    NetworkCase("mean", False, 2, sequence_parallel=True),
    NetworkCase("absorb", True, 50, dropout=0.3, recompute_every=2),
    NetworkCase("absorb", True, 50, dropout=0.3, sequence_parallel=True),
    NetworkCase("absorb", True, 50, dropout=0.3, segments=2),
    NetworkCase("uniform", False, 50, dropout=0.3, sequence_parallel=True, segments=4),
]


def loss_on_shard(problem: Problem, shard: VocabShard, weight: Tensor, bias: Tensor) -> Any:
    """Loss, per-sequence losses and the gradients of both on the given part of the vocabulary."""
    found: dict[str, Any] = {}
    for kind, function in (
        ("mean", linear_score_entropy),
        ("sequence", linear_score_entropy_per_sequence),
    ):
        leaves = [part.clone().requires_grad_() for part in (problem.hidden_LBH, weight, bias)]
        loss = function(*leaves, problem.targets, shard)
        # Sequences weighted unequally, so that their gradients cannot be taken for one another's.
        weights = torch.arange(1.0, 1.0 + loss.numel(), dtype=loss.dtype)
        (loss.reshape(-1) * weights).sum().backward()
        found[kind] = (loss.detach(), *(leaf.grad for leaf in leaves))
    return found


def run_network(case: NetworkCase, layout: Layout) -> dict[str, Any]:
    """Losses, log-scores' logits, shards of weights and gradients of one network."""
    layout = dataclasses.replace(layout, sequence_parallel=case.sequence_parallel)
    graph = graph_of(case.name, case.num_tokens)
    network = small_network(
        graph,
        layout,
        scaled=case.scaled,
        recompute_every=case.recompute_every,
        dropout=case.dropout,
        parametrisation="mean" if case.name == "mean" else "score",
    )
    inputs, targets, _ = noisy_batch(graph)
    if case.segments > 1:
        sigmas = [inputs[1] * factor for factor in torch.linspace(0.5, 2.0, case.segments).tolist()]
        inputs = (inputs[0], torch.stack(sigmas), inputs[2])
    places = {
        logical.name: (logical.shape, logical.partition_dim, logical.offset)
        for logical in logical_parameters(network, layout)
    }
    weights = {
        logical.name: logical.parameter.detach().clone()
        for logical in logical_parameters(network, layout)
    }
    loss = network(inputs, targets)
    loss.backward()
    with torch.no_grad():
        per_sequence = network(inputs, targets, per_sequence=True)
        hidden_LBH = network.hidden(*inputs[:2])
        logits = network.head.logits(hidden_LBH.flatten(0, 1))
    return {
        "loss": loss.detach(),
        "per_sequence": per_sequence,
        "logits": logits,
        "places": places,
        "weights": weights,
        "gradients": gradients(network, layout),
    }


def _rank_of_two(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = {"losses": {}, "networks": {}}
    for name, scaled, size in LOSS_CASES:
        problem = make_problem(name, scaled, size, padding=1)
        columns = -(-problem.graph.num_states // 2)
        start = columns * layout.tensor_rank
        shard = problem.shard(
            start=start,
            length=max(0, min(columns, size - start)),
            group=layout.tensor_group,
            chunk_bytes=CHUNK_BYTES,
        )
        mine = slice(start, start + columns)
        found["losses"][name, scaled, size] = loss_on_shard(
            problem, shard, problem.weight[mine], problem.bias[mine]
        )
    for case in NETWORK_CASES:
        found["networks"][case] = run_network(case, layout)
    return found


def _coordinates(layout: Layout) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(layout, device=None))  # type: ignore[arg-type]
    return {
        **fields,
        "first": layout.is_first_stage,
        "last": layout.is_last_stage,
        "tensor_ranks": dist.get_process_group_ranks(layout.tensor_group),
        "data_ranks": dist.get_process_group_ranks(layout.data_group),
    }


def _simulated_coordinates() -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    """Where each of eight processes would stand, with groups that never communicate."""
    os.environ["WORLD_SIZE"] = "8"
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    found: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for sizes in SIMULATED_LAYOUTS:
        found[sizes] = []
        for rank in range(8):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
            layout = initialize_layout(tensor=sizes[0], pipeline=sizes[1])
            found[sizes].append(_coordinates(layout))
            shutdown()
    return found


def main(folder: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rank = int(os.environ["RANK"])
    # A file to meet at, where a port might be taken.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    layouts = {}
    for tensor, pipeline in ((1, 2), (1, 1), (2, 1)):
        leave_layout()
        layout = initialize_layout(tensor=tensor, pipeline=pipeline)
        layouts[tensor, pipeline] = _coordinates(layout)
    found = _rank_of_two(layout)
    found["layouts"] = layouts
    dist.barrier()
    shutdown()
    found["simulated"] = _simulated_coordinates()
    torch.save(found, folder / f"{rank}.pt")


@functools.cache
def two_processes() -> list[dict[str, Any]]:
    """What each of the two processes found."""
    with tempfile.TemporaryDirectory() as folder:
        launch(2, [__file__, folder])
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(2)]


if __name__ == "__main__":
    # Cases are keyed by classes of this module under the name the tests import it by.
    from tests.parallel import vocab_worker

    vocab_worker.main(Path(sys.argv[1]))
