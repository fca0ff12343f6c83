"""Whether numbers that should be the same are, bit by bit, on every rank.

Data-parallel ranks each hold a copy of the working weights (under ZeRO 3 of those that are whole
everywhere); tensor-parallel ranks each hold a copy of every parameter that is not split, with its
own float32 state; and each rank's own part of the working weights is its float32 master, rounded.
Nothing in training compares these: a flipped bit or a nondeterministic kernel on one rank stays
unseen while the copies drift apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sedd_scale.engine.fragments import ZeroFragments
from sedd_scale.errors import TrainingError
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.agreement import gathered
from sedd_scale.parallel.layout import Layout

# Numbers hashed at a time, so that a check needs little memory of its own.
_HASH_LENGTH = 1 << 22
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, so that multiplying by it modulo 2^64 loses nothing (the golden ratio's bits).
_MULTIPLIER = 0x1E3779B97F4A7C15


class Difference(NamedTuple):
    """Copies of one tensor that are not the same."""

    name: str
    what: str
    axis: str
    """Over which ranks; "master": a rank's own two copies."""
    ranks: tuple[int, ...]
    """Of the whole job, those that hold copies."""
    odd: tuple[int, ...]
    """Those of them that differ from the copy most of them hold."""

    def __str__(self) -> str:
        if self.axis == "master":
            return f"{self.what} on rank {self.ranks[0]} is not its float32 master, rounded"
        if self.odd:
            verb = "differ" if len(self.odd) > 1 else "differs"
            who = f"rank {', '.join(map(str, self.odd))} {verb} from the others"
        else:
            who = "no copy has a majority"
        return f"{self.what} is not the same on {self.axis} ranks {list(self.ranks)}: {who}"


@torch.no_grad()
def check_replicas(step: int, fragments: ZeroFragments) -> None:
    """Compare all copies; collective over all processes.

    Raises:
        TrainingError: on every process; names a parameter, and the ranks whose copies differ.
    """
    parameters, layout = fragments.parameters, fragments.layout
    found = [
        Difference(logical.name, "the weight", "master", (layout.rank,), (layout.rank,))
        for logical in parameters
        if not _is_rounded_master(logical, fragments)
    ]
    if layout.data > 1:
        tensors = [
            (logical.name, "the weight", shard)
            for logical in parameters
            if (shard := logical.shard) is not None
        ]
        found += _differences(tensors, "data-parallel", layout.data_group, layout)
    if layout.tensor > 1:
        tensors = []
        for logical in parameters:
            if logical.partition_dim is not None:
                continue
            if logical.shard is not None:
                tensors.append((logical.name, "the weight", logical.shard))
            for key in fragments.state_keys(logical):
                fragment = fragments.get(logical, key)
                if fragment is not None:
                    tensors.append((logical.name, f"its float32 {key}", fragment.flat))
        found += _differences(tensors, "tensor-parallel", layout.tensor_group, layout)
    mismatches = torch.tensor(len(found), device=layout.device)
    if layout.world_size > 1:
        dist.all_reduce(mismatches)
    if not mismatches.item():
        return
    everywhere = sorted(set().union(*gathered(found)))
    name = everywhere[0].name
    count = len({difference.name for difference in everywhere})
    raise TrainingError(
        f"step {step}: {name}: {'; '.join(str(d) for d in everywhere if d.name == name)} "
        f"({count} parameter{'s' if count > 1 else ''} in all); a device or a kernel computes "
        "wrong numbers: resume from a checkpoint before it, without that machine"
    )


def bit_hash(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits, int64 on its device; any one changed bit changes it.

    The sum over i of bits_i * (2i + 1) * c modulo 2^64, mixed: the factors are odd, so one changed
    number cannot cancel, and they differ, so two exchanged numbers can hardly.
    """
    flat = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for piece in flat.split(_HASH_LENGTH):
        factors = torch.arange(start, start + len(piece), device=tensor.device) * 2 + 1
        total += ((piece.long() + _MULTIPLIER) * (factors * _MULTIPLIER)).sum()
        start += len(piece)
    return total ^ (total >> 32)


def _differences(
    tensors: Sequence[tuple[str, str, Tensor]], axis: str, group: dist.ProcessGroup, layout: Layout
) -> list[Difference]:
    """Of the copies that the ranks of one group hold, as each of them sees it."""
    if not tensors:
        return []
    mine = torch.stack([bit_hash(tensor) for _, _, tensor in tensors]).to(layout.device)
    ranks = tuple(dist.get_process_group_ranks(group))
    of_ranks = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(of_ranks, mine, group=group)
    hashes_RT = torch.stack(of_ranks).cpu()
    found = []
    for index in (hashes_RT != hashes_RT[0]).any(0).nonzero().flatten().tolist():
        name, what, _ = tensors[index]
        copies: list[int] = hashes_RT[:, index].tolist()
        common = max(sorted(set(copies)), key=copies.count)
        odd = tuple(rank for rank, copy in zip(ranks, copies, strict=True) if copy != common)
        tied = 2 * copies.count(common) <= len(copies)
        found.append(Difference(name, what, axis, ranks, () if tied else odd))
    return found


def _is_rounded_master(logical: LogicalParameter, fragments: ZeroFragments) -> bool:
    """Whether what this rank computes with is what it updates, as far as it holds both."""
    master = fragments.get(logical, "master")
    for working in fragments.working_copies(logical):
        assert master is not None
        for mine, exact in zip(
            working.split(_HASH_LENGTH), master.flat.split(_HASH_LENGTH), strict=True
        ):
            bits = _INTEGERS[mine.element_size()]
            if not torch.equal(mine.view(bits), exact.to(mine.dtype).view(bits)):
                return False
    return True
