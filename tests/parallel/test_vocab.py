"""The vocab-parallel loss against its definition on whole log-scores, in one process and in two."""

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_scale.diffusion.score_entropy import RowNoise
from sedd_scale.model.attention import document_starts
from sedd_scale.parallel import vocab
from sedd_scale.parallel.layout import Layout, initialize_layout
from sedd_scale.parallel.vocab import (
    gathered_logits,
    linear_score_entropy,
    linear_score_entropy_per_sequence,
    score_targets,
)
from tests.diffusion.reference import (
    log_score_score_entropy,
    log_scores_from_logits,
    row_loss,
    row_statistics,
)
from tests.model.small_network import relative
from tests.parallel.vocab_worker import (
    KINDS,
    LOSS_CASES,
    NETWORK_CASES,
    NetworkCase,
    Problem,
    loss_on_shard,
    make_problem,
    run_network,
    two_processes,
)
from tests.tolerance import GRADIENT, NETWORK, Bound, float32_bounds

SIZES = (2, 5, 50, 1000)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return initialize_layout()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return two_processes()


def by_definition(problem: Problem, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Score entropy [B, L] from whole log-scores, by autograd-friendly elementary operations."""
    states = problem.graph.num_states
    logits_BLV = (hidden @ weight[:states].t() + bias[:states]).transpose(0, 1)
    noise = RowNoise(*problem.noise_B3.unbind(1))
    log_score_BLV = log_scores_from_logits(
        logits_BLV,
        problem.noisy_BL,
        noise.sigma,
        graph=problem.graph,
        scaled=problem.scaled,
        mean=problem.mean,
    )
    return log_score_score_entropy(
        log_score_BLV, problem.noisy_BL, problem.clean_BL, noise, graph=problem.graph
    )


def in_double(problem: Problem) -> Problem:
    """The same numbers, in float64."""
    parts = {name: getattr(problem, name).double() for name in ("hidden_LBH", "weight", "bias")}
    return problem._replace(**parts)


WEIGHTS_B = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def results_of(loss: Tensor, loss_B: Tensor, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    """Both losses and the gradients of the mean and of a weighted sum, by name."""
    found = {"mean loss": loss, "losses": loss_B}
    weighted = (WEIGHTS_B.to(loss_B.dtype) * loss_B).sum()
    for kind, value in (("mean loss", loss), ("weighted losses", weighted)):
        gradients = torch.autograd.grad(value, leaves, retain_graph=True)
        found |= {
            f"gradient of the {kind} by {name}": gradient
            for name, gradient in zip(("hidden", "weight", "bias"), gradients)
        }
    return found


def defined(problem: Problem, *leaves: Tensor) -> dict[str, Tensor]:
    """`results_of` the definition."""
    loss_BL = by_definition(problem, *leaves)
    return results_of(loss_BL.mean(), loss_BL.sum(1), leaves)


def computed(problem: Problem) -> dict[str, Tensor]:
    """`results_of` the program, in the problem's type."""
    leaves, targets, shard = problem.leaves, problem.targets, problem.shard()
    loss = linear_score_entropy(*leaves, targets, shard)
    loss_B = linear_score_entropy_per_sequence(*leaves, targets, shard)
    return results_of(loss, loss_B, leaves)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_losses_and_gradients_are_the_definitions(name: str, scaled: bool, size: int) -> None:
    problem = make_problem(name, scaled, size)
    expected = defined(problem, *problem.leaves)
    for what, found in computed(problem).items():
        assert found.dtype == torch.float64
        if expected[what].count_nonzero():
            assert relative(found, expected[what]) < 1e-12, what
        else:
            assert not found.count_nonzero(), what


@functools.cache
def explained(name: str, scaled: bool, size: int) -> tuple[Problem, dict[str, Bound]]:
    """A problem in float32, and what its definition allows."""
    length = 3 if size > 9999 else 6
    problem = make_problem(name, scaled, size, dtype=torch.float32, length=length)
    names = list(computed(problem))
    bounds = float32_bounds(
        lambda *leaves: list(defined(problem, *leaves).values()),
        *problem.leaves,
        draws=4 if size > 9999 else 8,
    )
    return problem, dict(zip(names, bounds))


@pytest.mark.parametrize("size", [*SIZES, 32768])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_float32_is_the_definition_but_for_roundings(name: str, scaled: bool, size: int) -> None:
    problem, bounds = explained(name, scaled, size)
    for what, found in computed(problem).items():
        assert found.dtype == torch.float32
        bounds[what].check(found, what)


@pytest.mark.parametrize("size", [2, 50, 32768])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_a_formula_that_is_wrong_by_1e_4_is_found(
    name: str, scaled: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in a chunk's losses and gradient: every result has to fail."""
    problem, bounds = explained(name, scaled, size)
    chunk_loss = vocab._chunk_loss

    def wrong(*arguments: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        loss_m, made = chunk_loss(*arguments)
        off = 1 + 1e-4
        return loss_m * off, None if made is None else tuple(part * off for part in made)

    monkeypatch.setattr(vocab, "_chunk_loss", wrong)
    for what, found in computed(problem).items():
        if bounds[what].exact.count_nonzero():
            with pytest.raises(AssertionError, match="times what float32 can explain"):
                bounds[what].check(found, what)


@pytest.mark.parametrize("function", [linear_score_entropy, linear_score_entropy_per_sequence])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_gradients_are_the_finite_differences(name: str, scaled: bool, function: Any) -> None:
    problem = make_problem(name, scaled, 5, length=3, width=3)
    targets, shard = problem.targets, problem.shard()
    assert torch.autograd.gradcheck(
        lambda *leaves: function(*leaves, targets, shard), problem.leaves
    )


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_any_cut_into_chunks_gives_the_same(name: str, scaled: bool) -> None:
    problem = make_problem(name, scaled, 50, length=25)
    shards = [problem.shard(chunk_bytes=size) for size in (1, 4 * 51 * 23, 2**25)]
    rows = len(problem.targets.rows_M)
    assert {-(-rows // shard.chunk_rows(problem.graph.num_states)) for shard in shards} > {1}
    one, *others = (loss_on_shard(problem, shard, problem.weight, problem.bias) for shard in shards)
    for other in others:
        for kind, parts in one.items():
            for part, same in zip(parts, other[kind]):
                torch.testing.assert_close(part, same, rtol=1e-12, atol=1e-14)


ENDS_BE = torch.tensor([[6, 6, 6], [2, 6, 6], [1, 3, 6], [5, 6, 6]])


@pytest.mark.parametrize("ends_BE", [None, ENDS_BE], ids=["whole", "documents"])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_outputs_for_the_next_position_are_the_definition_s(
    name: str, scaled: bool, ends_BE: Tensor | None
) -> None:
    """Of hidden states moved by a plain loop; gradients of rows that are there twice add up."""
    problem = make_problem(name, scaled, 50)
    starts_BL = document_starts(problem.clean_BL.shape, ends_BE)
    targets = score_targets(
        problem.graph,
        clean_BL=problem.clean_BL,
        noisy_BL=problem.noisy_BL,
        noise_B3=problem.noise_B3,
        starts_BL=starts_BL,
    )
    assert len(targets.rows_M.unique()) < len(targets.rows_M), "a row has to be there twice"

    def moved(hidden_LBH: Tensor) -> Tensor:
        rows = []
        for b in range(4):
            begins = [0] if ends_BE is None else [0, *ends_BE[b].tolist()]
            rows += [[hidden_LBH[i if i in begins else i - 1, b] for i in range(6)]]
        return torch.stack([torch.stack(row) for row in rows], dim=1)

    hidden, weight, bias = problem.leaves
    loss_BL = by_definition(problem, moved(hidden), weight, bias)
    expected = results_of(loss_BL.mean(), loss_BL.sum(1), (hidden, weight, bias))
    shard = problem.shard(rows_twice=True)
    found = []
    for _ in range(2):
        leaves = problem.leaves
        loss = linear_score_entropy(*leaves, targets, shard)
        loss_B = linear_score_entropy_per_sequence(*leaves, targets, shard)
        found.append(results_of(loss, loss_B, leaves))
    for what, value in expected.items():
        torch.testing.assert_close(found[0][what], value, rtol=1e-11, atol=1e-13)
        assert torch.equal(found[0][what], found[1][what]), what


def test_the_budget_bounds_the_rows_of_a_chunk() -> None:
    shard = make_problem("absorb", True, 50_257, length=1, width=1).shard(chunk_bytes=32 * 2**20)
    rows = shard.chunk_rows(50_258)
    assert rows * 50_258 * 4 <= shard.chunk_bytes < (rows + 1) * 50_258 * 4


def test_a_batch_without_masks_loses_nothing() -> None:
    for scaled in (True, False):
        problem = make_problem("absorb", scaled, 50)
        problem = problem._replace(noisy_BL=problem.clean_BL)
        assert len(problem.targets.rows_M) == 0
        found = loss_on_shard(problem, problem.shard(), problem.weight, problem.bias)
        for parts in found.values():
            for part in parts:
                assert torch.isfinite(part).all() and not part.count_nonzero()


@pytest.mark.parametrize("scaled", [True, False])
def test_a_batch_of_masks_only_is_the_definitions(scaled: bool) -> None:
    problem = make_problem("absorb", scaled, 50)
    problem = problem._replace(noisy_BL=torch.full_like(problem.clean_BL, 50))
    assert len(problem.targets.rows_M) == problem.clean_BL.numel()
    leaves = problem.leaves
    expected = by_definition(problem, *leaves).mean()
    loss = linear_score_entropy(*leaves, problem.targets, problem.shard())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    for part, same in pairs:
        assert relative(part, same) < 1e-12


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_mask_row_and_padding_take_no_part(name: str, scaled: bool) -> None:
    plain = make_problem(name, scaled, 50)
    padded = make_problem(name, scaled, 50, padding=7)
    tokens = slice(0, 50)
    padded.weight[tokens], padded.bias[tokens] = plain.weight[tokens], plain.bias[tokens]
    padded.weight[50:], padded.bias[50:] = torch.nan, torch.inf  # the mask row too
    padded = padded._replace(hidden_LBH=plain.hidden_LBH)
    expected = loss_on_shard(plain, plain.shard(), plain.weight, plain.bias)
    found = loss_on_shard(padded, padded.shard(), padded.weight, padded.bias)
    for kind, (loss, hidden, weight, bias) in found.items():
        torch.testing.assert_close(loss, expected[kind][0], rtol=0.0, atol=0.0)
        torch.testing.assert_close(hidden, expected[kind][1], rtol=0.0, atol=0.0)
        torch.testing.assert_close(weight[tokens], expected[kind][2][tokens], rtol=0.0, atol=0.0)
        torch.testing.assert_close(bias[tokens], expected[kind][3][tokens], rtol=0.0, atol=0.0)
        assert not weight[50:].count_nonzero() and not bias[50:].count_nonzero()


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_rows_that_do_not_count_get_no_gradient(name: str, scaled: bool) -> None:
    problem = make_problem(name, scaled, 50)
    _, hidden_LBH, _, _ = loss_on_shard(problem, problem.shard(), problem.weight, problem.bias)[
        "mean"
    ]
    counted_LB = torch.ones(hidden_LBH.shape[:2], dtype=torch.bool)
    if problem.graph.mask_id is not None:
        counted_LB = (problem.noisy_BL == 50).t()
        assert counted_LB.any() and not counted_LB.all()
    assert torch.equal(hidden_LBH.count_nonzero(dim=-1) > 0, counted_LB)


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_bf16_weights_have_float32_statistics(name: str, scaled: bool) -> None:
    """Only the product's own rounding shows; a bf16 sum of so many terms would stop growing."""
    problem = make_problem(name, scaled, 32768, dtype=torch.bfloat16, length=3)
    targets, shard = problem.targets, problem.shard()
    leaves = problem.leaves
    loss = linear_score_entropy(*leaves, targets, shard)
    assert loss.dtype == torch.float32
    loss_B = linear_score_entropy_per_sequence(*leaves, targets, shard)
    assert loss_B.dtype == torch.float32

    rounded = in_double(problem)
    rounded_leaves = rounded.leaves
    in_full = by_definition(rounded, *rounded_leaves).mean()
    assert abs(loss.item() / in_full.item() - 1) < 1e-2

    truth = torch.autograd.grad(in_full, rounded_leaves)
    for part, true_part in zip(torch.autograd.grad(loss, leaves), truth):
        assert part.dtype == torch.bfloat16
        assert relative(part, true_part) < 1e-2
    if problem.mean:
        return
    rows = problem.hidden_LBH.flatten(0, 1)[targets.rows_M]
    logits_MN = torch.addmm(problem.bias[:32768], rows, problem.weight[:32768].t()).double()
    uniform = name == "uniform"
    exact = row_loss(
        row_statistics(logits_MN, targets.clean_M, targets.noisy_M if uniform else None),
        RowNoise(*problem.noise_B3[targets.sequence_M].unbind(1)),
        graph=problem.graph,
        scaled=scaled,
        unchanged_M=targets.clean_M == targets.noisy_M if uniform else None,
    )
    expected = exact.loss.sum().item() / problem.clean_BL.numel()
    # Three bounds of 4e-6 stand in float32's tests above; a sum in bfloat16 is off by 1e-2 or more.
    assert abs(loss.item() / expected - 1) < 1e-5
    assert abs(loss_B.sum().item() / exact.loss.sum().item() - 1) < 1e-5


def test_bf16_weight_gradients_add_up_over_chunks_in_float32() -> None:
    problem = make_problem("uniform", False, 50, dtype=torch.bfloat16, length=800)
    cut, whole = (
        loss_on_shard(problem, problem.shard(chunk_bytes=size), problem.weight, problem.bias)
        for size in (1, 2**25)
    )
    assert len(problem.targets.rows_M) > 100 * 16
    for part, same in zip(cut["mean"][2:], whole["mean"][2:]):
        assert relative(part, same) < 4e-3  # one rounding to 8 bits, where 200 would be 20 times it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_memory_held_before_does_not_matter(dtype: torch.dtype) -> None:
    """Some processors' products read whole tiles, past the last column (bfloat16 with AMX)."""
    problem = make_problem("absorb", True, 257, dtype=dtype, length=60)
    leaves = problem.leaves
    expected = torch.autograd.grad(
        linear_score_entropy(*leaves, problem.targets, problem.shard()), leaves
    )
    torch.use_deterministic_algorithms(True)  # which fills every empty tensor with NaN
    try:
        found = torch.autograd.grad(
            linear_score_entropy(*leaves, problem.targets, problem.shard()), leaves
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for part, same in zip(found, expected):
        assert torch.equal(part, same)


class Allocations(TorchDispatchMode):
    """The most bytes of new tensors that were alive at once, of everything run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            value.untyped_storage()._cdata
            for value in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(value, Tensor)
        }
        for value in torch.utils._pytree.tree_leaves(result):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in inputs or key in self.live:
                continue
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("width", [16, 300], ids=["logits", "weights"])
@pytest.mark.parametrize("function", [linear_score_entropy, linear_score_entropy_per_sequence])
@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_memory_is_the_gradients_and_one_chunk(
    name: str, scaled: bool, function: Any, width: int
) -> None:
    """Whether the 16 chunks of logits or the weight outweigh the rest, neither is there twice."""
    problem = make_problem(name, scaled, 4000, dtype=torch.float32, length=300, width=width)
    leaves, targets = problem.leaves, problem.targets
    num_rows, columns = len(targets.rows_M), len(problem.weight)
    shard = problem.shard(chunk_bytes=4 * columns * (num_rows // 16))
    # A chunk's rows of hidden states and of their gradient; a few numbers of each row.
    small = 2 * 4 * width * (num_rows // 16) + 100 * num_rows
    with Allocations() as training:
        function(*leaves, targets, shard).sum().backward()
    gradients = sum(leaf.grad.nbytes for leaf in leaves)
    assert gradients < training.peak <= gradients + shard.chunk_bytes + small
    with torch.no_grad(), Allocations() as evaluation:
        function(*leaves, targets, shard)
    assert shard.chunk_bytes * 0.9 < evaluation.peak <= shard.chunk_bytes + small


@pytest.mark.parametrize(("name", "scaled"), KINDS)
def test_without_gradients_the_values_are_the_same(name: str, scaled: bool) -> None:
    problem = make_problem(name, scaled, 50)
    for function in (linear_score_entropy, linear_score_entropy_per_sequence):
        loss = function(*problem.leaves, problem.targets, problem.shard())
        with torch.no_grad():
            same = function(*problem.leaves, problem.targets, problem.shard())
        assert loss.requires_grad and not same.requires_grad
        assert torch.equal(loss, same)


def test_a_second_backward_pass_gives_the_same() -> None:
    """Gradients made ahead must survive the first pass and follow what comes back."""
    problem = make_problem("absorb", True, 50)
    leaves = problem.leaves
    loss = linear_score_entropy(*leaves, problem.targets, problem.shard())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [part.clone() for part in first]
    second = torch.autograd.grad(-3.0 * loss, leaves)
    for part, copy, other in zip(first, kept, second):
        assert torch.equal(part, copy)
        torch.testing.assert_close(other, -3.0 * copy, rtol=1e-14, atol=0.0)


def test_logits_leave_the_padding_out() -> None:
    problem = make_problem("absorb", True, 50, padding=5)
    rows_MH = problem.hidden_LBH.flatten(0, 1)
    found = gathered_logits(
        rows_MH, problem.weight, problem.bias, num_columns=51, tensor_group=None
    )
    expected = rows_MH @ problem.weight[:51].t() + problem.bias[:51]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "scaled", "size"), LOSS_CASES)
def test_two_tensor_ranks_lose_what_one_does(
    name: str, scaled: bool, size: int, ranks: list[dict[str, Any]]
) -> None:
    problem = make_problem(name, scaled, size, padding=1)
    expected = loss_on_shard(problem, problem.shard(), problem.weight, problem.bias)
    shards = [rank["losses"][name, scaled, size] for rank in ranks]
    states = problem.graph.num_states
    for kind, (loss, hidden, weight, bias) in expected.items():
        first, second = (shard[kind] for shard in shards)
        assert torch.equal(first[0], second[0])
        torch.testing.assert_close(first[0], loss, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(first[1] + second[1], hidden, rtol=1e-10, atol=1e-14)
        for index, whole in ((2, weight), (3, bias)):
            joined = torch.cat([first[index], second[index]])
            torch.testing.assert_close(joined[:states], whole[:states], rtol=1e-10, atol=1e-14)
            assert not joined[size:].count_nonzero()


@pytest.mark.parametrize("case", NETWORK_CASES, ids=str)
def test_a_network_on_two_tensor_ranks_is_the_same(
    case: NetworkCase, layout: Layout, ranks: list[dict[str, Any]]
) -> None:
    alone = dataclasses.replace(case, sequence_parallel=False, recompute_every=0)
    expected = run_network(alone, layout)
    shards = [rank["networks"][case] for rank in ranks]
    for name in ("loss", "per_sequence", "logits"):
        assert torch.equal(shards[0][name], shards[1][name])
        assert relative(shards[0][name], expected[name]) < NETWORK, name
    for name, whole in expected["gradients"].items():
        shape, dim, _ = shards[0]["places"][name]
        parts = [shard["gradients"][name] for shard in shards]
        if dim is None:
            torch.testing.assert_close(*parts, rtol=0.0, atol=0.0)
            joined = parts[0]
        else:
            joined = torch.cat(parts, dim)
            assert not joined.narrow(dim, shape[dim], joined.shape[dim] - shape[dim]).any()
            joined = joined.narrow(dim, 0, shape[dim])
        assert whole.norm() == 0 == joined.norm() or relative(joined, whole) < GRADIENT, name
