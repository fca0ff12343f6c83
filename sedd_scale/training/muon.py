"""Muon for the trunk's matrices beside AdamW for all else, the same under every layout.

An update is the momentum of the gradient with its singular values brought to about one (Jordan et
al. 2024; at scale arXiv 2502.16982). The matrix is the logical one: queries, keys and values apart,
gate and up apart, whole over tensor ranks and ZeRO's fragments. Momentum is linear, so each rank
keeps and updates its own fragment; only to orthogonalise is a matrix whole, at one rank, its owner:
fragments travel there and back.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from sedd_scale.config import TrunkShape
from sedd_scale.engine.fragments import ZeroFragments
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.agreement import gathered
from sedd_scale.planning.model_states import MUON
from sedd_scale.training.adamw import AdamWithEMA

# Of Newton and Schulz's iteration, five times: singular values from 0.01 on come to 0.7 to 1.2.
_COEFFICIENTS, _STEPS = (3.4445, -4.7750, 2.0315), 5
# Of an update whose entries have this root mean square, as AdamW's have (arXiv 2502.16982, 2.2).
_ROOT_MEAN_SQUARE = 0.2
_EPS = 1e-7


class MuonWithEMA(AdamWithEMA):
    """Muon for groups whose "rule" is `MUON`, AdamW for the others, and the average of all.

    M <- lerp(M, G, 1 - momentum), U = lerp(G, M, momentum), and the weight moves by lr * lr_ratio *
    0.2 sqrt(max(rows, columns)) times U with its singular values at one: entries then have the root
    mean square of AdamW's, so that both take one learning rate. Weight decay is decoupled.

    Args:
        trunk: of the network, which says where queries, keys and values lie.
        momentum: decay of M.
        lr_ratio: of the learning rate of matrices to that of all else.
        options: of `AdamWithEMA`.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        trunk: TrunkShape,
        momentum: float = 0.95,
        lr_ratio: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(parameters, **options)
        self.trunk, self.momentum, self.lr_ratio = trunk, momentum, lr_ratio
        self._owners: Owners | None = None

    def connect(self, fragments: ZeroFragments) -> None:
        self._owners = Owners(fragments, self.trunk)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then fold it into its average."""
        groups = [group for group in self.param_groups if group.get("rule") == MUON]
        given = [
            (parameter, parameter.grad, group)
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for parameter, _, _ in given:
            parameter.grad = None  # AdamW is not to see it
        loss = super().step(closure)
        for parameter, grad, _ in given:
            parameter.grad = grad
        if given:
            self._step(given)
        return loss

    def _step(self, given: Sequence[tuple[Tensor, Tensor, dict[str, Any]]]) -> None:
        assert self._owners is not None, "not connected to the engine's fragments"
        directions = []
        for parameter, grad, _ in given:
            momentum = self.initialize_state(parameter)["momentum"]
            if self.grad_scale is not None:
                grad = grad / self.grad_scale
            if self.found_inf is not None:
                grad = torch.where(self.found_inf > 0, momentum, grad)  # which changes nothing
            momentum.lerp_(grad, 1 - self.momentum)
            directions.append((parameter, torch.lerp(grad, momentum, self.momentum)))
        updates = self._owners.orthogonalised(directions)
        keep = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        for (parameter, _, group), update in zip(given, updates, strict=True):
            lr = group["lr"] * self.lr_ratio * keep
            parameter.mul_(1 - lr * group["weight_decay"]).sub_(lr * update)
            self.state[parameter]["step"] += 1
            self._fold(parameter)


class _Piece(NamedTuple):
    """A rank's fragment of one matrix: a range of its tensor rank's flattened shard."""

    tensor_rank: int
    start: int
    numel: int


class _Matrix(NamedTuple):
    """A parameter that is orthogonalised, and who holds what of it.

    Attributes:
        logical: this rank's shard of it.
        partition: in which partition of the optimizer its fragments lie, on every rank.
        begin: where this rank's fragment begins there.
        pieces: of each rank of the group.
        owner: the rank of the group that orthogonalises it.
    """

    logical: LogicalParameter
    partition: int
    begin: int
    pieces: tuple[_Piece, ...]
    owner: int

    def assembled(self, parts: Mapping[int, Tensor], tensor: int) -> Tensor:
        """The whole matrix of the ranks' fragments."""
        some = next(iter(parts.values()))
        shards = some.new_empty(tensor, math.prod(self.logical.local_shape))
        for rank, part in parts.items():
            piece = self.pieces[rank]
            shards[piece.tensor_rank, piece.start : piece.start + piece.numel] = part
        whole = shards.view(tensor, *self.logical.local_shape).unbind(0)
        return torch.cat(whole, dim=self.logical.partition_dim or 0)

    def fragment(self, whole: Tensor, rank: int) -> Tensor:
        """What a rank holds of the whole matrix, flat."""
        piece, dim = self.pieces[rank], self.logical.partition_dim or 0
        length = self.logical.local_shape[dim]
        shard = whole.narrow(dim, piece.tensor_rank * length, length)
        return shard.reshape(-1)[piece.start : piece.start + piece.numel]


class Owners:
    """Which rank orthogonalises which matrix, and the way there and back.

    A matrix's owner is the least loaded of those that hold most of it: then no more travels than
    (n - 1) / n of the matrices each way, and nothing where ZeRO has left a matrix whole. Making one
    is collective over the tensor and data-parallel ranks of a stage.

    Attributes:
        sent: numbers that this rank has sent to others.
    """

    def __init__(self, fragments: ZeroFragments, trunk: TrunkShape) -> None:
        layout = fragments.layout
        self._trunk, self._tensor, self.sent = trunk, layout.tensor, 0
        self._group = parallel_state.get_tensor_and_data_parallel_group()
        self._rank, self._size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self._index = {id(flat): index for index, flat in enumerate(fragments.partitions)}
        matrices = [one for one in fragments.parameters if fragments.rule(one) == MUON]
        places = [fragments.place(one) for one in matrices]
        own = [
            None if place is None else (place.partition, place.start, place.numel)
            for place in places
        ]
        of_ranks = gathered((layout.tensor_rank, own), self._group)
        loads = [0.0] * self._size
        chosen: dict[int, _Matrix] = {}
        cost = [math.prod(one.shape) * min(one.shape) for one in matrices]
        for number in sorted(range(len(matrices)), key=lambda number: -cost[number]):
            held = [(rank, ranges[number]) for rank, ranges in of_ranks]
            pieces = tuple(
                _Piece(rank, *(place[1:] if place is not None else (0, 0))) for rank, place in held
            )
            most = max(piece.numel for piece in pieces)
            holders = [r for r, piece in enumerate(pieces) if 2 * piece.numel >= most]
            owner = min(holders, key=lambda rank: loads[rank])
            loads[owner] += cost[number]
            (partition,) = {place[0] for _, place in held if place is not None}
            mine = places[number]
            begin = 0 if mine is None else mine.begin
            chosen[number] = _Matrix(matrices[number], partition, begin, pieces, owner)
        self._matrices = [chosen[number] for number in range(len(matrices))]

    def orthogonalised(self, directions: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """What moves each partition, as it lies there.

        Args:
            directions: partitions of the optimizer, and the momentum of their gradients.
        """
        flats = {self._index[id(partition)]: flat for partition, flat in directions}
        results = {index: torch.zeros_like(flat) for index, flat in flats.items()}
        taken = [matrix for matrix in self._matrices if matrix.partition in flats]
        mine = [matrix for matrix in taken if matrix.owner == self._rank]
        dtype = torch.bfloat16 if directions[0][1].is_cuda else directions[0][1].dtype
        to_owners = [
            [
                flats[one.partition].narrow(0, one.begin, one.pieces[self._rank].numel).to(dtype)
                for one in taken
                if one.owner == owner
            ]
            for owner in range(self._size)
        ]
        numels = [[one.pieces[rank].numel for one in mine] for rank in range(self._size)]
        received = self._exchange(to_owners, numels)
        wholes = [
            one.assembled({rank: parts[at] for rank, parts in enumerate(received)}, self._tensor)
            for at, one in enumerate(mine)
        ]
        made = self._matrices_of(mine, wholes)
        back = [
            [one.fragment(whole, rank) for one, whole in zip(mine, made)]
            for rank in range(self._size)
        ]
        numels = [[part.numel() for part in parts] for parts in to_owners]
        for owner, parts in enumerate(self._exchange(back, numels)):
            of_owner = (one for one in taken if one.owner == owner)
            for one, part in zip(of_owner, parts, strict=True):
                results[one.partition].narrow(0, one.begin, part.numel()).copy_(part)
        return [results[self._index[id(partition)]] for partition, _ in directions]

    def _matrices_of(self, owned: Sequence[_Matrix], wholes: Sequence[Tensor]) -> list[Tensor]:
        """The wholes with their matrices orthogonal, each in its place."""
        parts = [part for one, whole in zip(owned, wholes) for part in self._parts(one, whole)]
        rest = iter(orthogonal(parts))
        return [
            self._joined(one, whole, [next(rest) for _ in self._parts(one, whole)])
            for one, whole in zip(owned, wholes)
        ]

    def _parts(self, one: _Matrix, whole: Tensor) -> list[Tensor]:
        """The matrices of one parameter: of queries, keys and values three."""
        if not one.logical.name.endswith("linear_qkv.weight"):
            return [whole]
        each = self._trunk.heads // self._trunk.kv_heads
        groups = whole.view(self._trunk.kv_heads, each + 2, self._trunk.head_dim, -1)
        return [part.flatten(0, 2) for part in groups.split([each, 1, 1], dim=1)]

    def _joined(self, one: _Matrix, whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        shape = (self._trunk.kv_heads, -1, self._trunk.head_dim, whole.shape[1])
        return torch.cat([part.reshape(shape) for part in parts], dim=1).reshape(whole.shape)

    def _exchange(
        self, to_ranks: Sequence[Sequence[Tensor]], numels: Sequence[Sequence[int]]
    ) -> list[Sequence[Tensor]]:
        """What each rank has sent here, in pieces of the given sizes."""
        if self._size == 1:
            return [to_ranks[0]]
        some = [part for parts in to_ranks for part in parts]
        sizes = [sum(part.numel() for part in parts) for parts in to_ranks]
        totals = [sum(parts) for parts in numels]
        like = some[0] if some else torch.zeros(0)
        sent = torch.cat(some) if some else like
        received = like.new_empty(sum(totals))
        self.sent += sum(sizes) - sizes[self._rank]
        dist.all_to_all_single(received, sent, totals, sizes, group=self._group)
        return [part.split(list(of_rank)) for part, of_rank in zip(received.split(totals), numels)]


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """0.2 sqrt(max(rows, columns)) times each with its singular values at about one.

    Matrices of one shape go together, which a device does as fast as one.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(number)
    made: dict[int, Tensor] = {}
    a, b, c = _COEFFICIENTS
    for (rows, columns), numbers in by_shape.items():
        stood = [matrices[number] for number in numbers]
        x = torch.stack([one if one.shape[0] == rows else one.t() for one in stood])
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=precise)
        x = x / (norm + _EPS).to(x.dtype)
        for _ in range(_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x * (_ROOT_MEAN_SQUARE * math.sqrt(columns))
        for number, result, one in zip(numbers, x, stood):
            made[number] = result if one.shape[0] == rows else result.t()
    return [made[number] for number in range(len(matrices))]
