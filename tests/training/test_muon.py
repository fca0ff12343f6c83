"""Muon against its definition on whole matrices, and what a refused step leaves alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sedd_scale.config import Config, load_config
from sedd_scale.engine.engine import make_engine
from sedd_scale.errors import CheckpointError
from sedd_scale.model.network import layer_builders
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning.model_states import ADAMW, MUON, update_rule
from sedd_scale.training.loop import open_dataset, train
from sedd_scale.training.muon import orthogonal
from sedd_scale.training.optimizer import make_optimizer
from tests.datasets import dataset_of_files, letters
from tests.repository import ROOT

LR, DECAY, MOMENTUM, RATIO = 1e-3, 0.1, 0.9, 3.0
SIZES = (
    *("model.hidden_size=32", "model.num_layers=1", "model.num_heads=4", "model.num_kv_heads=2"),
    *("model.cond_dim=16", "model.activation=swiglu", "model.zero_init=false"),
    *("optimizer.name=muon", f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}"),
    *(f"optimizer.muon_momentum={MOMENTUM}", f"optimizer.muon_lr_ratio={RATIO}"),
)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40)])
def test_singular_values_come_to_about_one(shape: tuple[int, int]) -> None:
    """Of values over two orders of magnitude; directions stay."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], 8, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], 8, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -2, 8, dtype=torch.float64)
    (found,) = orthogonal([left * values @ right.t()])
    found = left.t() @ (found / (0.2 * math.sqrt(max(shape)))) @ right
    diagonal = found.diagonal()
    assert bool(((diagonal > 0.65) & (diagonal < 1.25)).all())
    torch.testing.assert_close(
        found - diagonal.diag(), torch.zeros(8, 8).double(), atol=1e-9, rtol=0
    )


def definition(update: np.ndarray) -> np.ndarray:
    """Of one matrix, on numpy: x <- a x + (b x x^T + c (x x^T)^2) x, five times."""
    wide = update if update.shape[0] <= update.shape[1] else update.T
    x = wide / np.linalg.norm(wide)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = 0.2 * math.sqrt(max(x.shape)) * x
    return x if update.shape[0] <= update.shape[1] else x.T


def matrices(logical: LogicalParameter, rows: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which rows make a matrix, and the matrix: of queries, keys and values three."""
    whole = rows.double().numpy()
    numbers = np.arange(len(whole))
    if not logical.name.endswith("linear_qkv.weight"):
        return [(numbers, whole)]
    # Of each of two heads of keys: two heads of queries, the key, the value, 8 wide.
    of_head = numbers.reshape(2, 4, 8)
    parts = (of_head[:, :2], of_head[:, 2], of_head[:, 3])
    return [(part.ravel(), whole[part.ravel()]) for part in parts]


def test_a_step_is_the_definition_on_whole_matrices() -> None:
    config = Config().override(*SIZES, "training.precision=fp32", "training.global_batch=1")
    config = config.override("training.micro_batch=1", "model.vocab_size=50")
    layout = initialize_layout()
    from sedd_scale.diffusion.graphs import make_graph

    builders = layer_builders(config, make_graph("absorb", 50), layout)
    engine = make_engine(
        builders, layout, config, lambda parameters, cut: make_optimizer(config, parameters, cut)
    )
    fragments = engine.fragments
    fragments.ensure_state()
    optimizer = fragments._zero.adam
    trunk = [one for one in engine.parameters if fragments.rule(one) == MUON]
    assert len(trunk) == 5 and all(update_rule("muon", one.name) == MUON for one in trunk)
    weights = {one.name: fragments.get(one, "master").flat.clone() for one in trunk}  # type: ignore[union-attr]
    means = {one.name: torch.zeros(one.shape, dtype=torch.float64) for one in trunk}
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        refused = step == 1
        grads = {one.name: torch.randn(one.shape, generator=generator) for one in trunk}
        for partition in fragments.partitions:
            partition.grad = torch.zeros_like(partition)
        for one in trunk:
            place = fragments.place(one)
            assert place is not None
            flat = fragments.partitions[place.partition].grad
            assert flat is not None
            given = torch.full_like(grads[one.name], torch.nan) if refused else grads[one.name]
            flat.narrow(0, place.begin, place.numel).copy_(given.flatten())
        optimizer.found_inf = torch.tensor(float(refused))
        optimizer.grad_scale = torch.tensor(2.0)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        for one in trunk:
            if not refused:
                gradient = grads[one.name].double() / 2.0
                mean = means[one.name] = MOMENTUM * means[one.name] + (1 - MOMENTUM) * gradient
                direction = (1 - MOMENTUM) * gradient + MOMENTUM * mean
                expected = weights[one.name].double().view(one.shape).numpy()
                expected = expected * (1 - LR * RATIO * DECAY)
                for rows, matrix in matrices(one, direction):
                    expected[rows] -= LR * RATIO * definition(matrix)
                weights[one.name] = torch.from_numpy(expected).flatten()
            found = fragments.get(one, "master")
            assert found is not None
            error = (found.flat.double() - weights[one.name]).norm() / weights[one.name].norm()
            assert float(error) < 1e-6, (one.name, step)


def test_what_muon_updates() -> None:
    """The trunk's matrices; neither its norms, modulations and biases, nor embedding and head."""
    assert update_rule("muon", "blocks.3.attention.linear_qkv.weight") == MUON
    assert update_rule("muon", "blocks.3.mlp.linear_fc1.gate.weight") == MUON
    for name in (
        *("blocks.0.mlp.linear_fc1.bias", "blocks.0.modulation.linear.weight"),
        *("blocks.0.attention.q_norm.weight", "embedding.tokens.weight", "head.linear.weight"),
    ):
        assert update_rule("muon", name) == ADAMW
    assert update_rule("adamw", "blocks.3.attention.linear_qkv.weight") == ADAMW


def test_another_optimizer_does_not_go_on(tmp_path: Path) -> None:
    """Whose moments are not there; a new run may start from the weights."""
    data = dataset_of_files(tmp_path / "data", letters(), block_length=16)
    given = (
        *(f"data.path={data}", "training.steps=2", "training.valid_every=0", "checkpoint.every=2"),
        *("model.hidden_size=32", "model.num_layers=1"),
    )
    tiny = ROOT / "configs/runs/tiny.yaml"
    train(load_config(tiny, [*given, "optimizer.name=muon"]), tmp_path / "run")
    more = [*given, "training.steps=4"]
    with pytest.raises(
        CheckpointError, match=r"optimizer\.name=muon, not adamw: .*model\.init_from"
    ):
        train(load_config(tiny, more), tmp_path / "run")
    config, _ = open_dataset(load_config(tiny, [*more, f"model.init_from={tmp_path / 'run'}"]))
    train(config, tmp_path / "other")
