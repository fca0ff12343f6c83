"""Every layout trains the same run: a table of layouts, and what they must agree on.

Real training with a head that is not zero and clipping active, under each layout, must give the
losses, gradient norms and final weights of one process; and one process must give those of a plain
PyTorch loop that knows nothing of Megatron-core or DeepSpeed.
"""

from pathlib import Path

import pytest
import torch

from sedd_scale.checkpoint.directory import find_checkpoint
from sedd_scale.checkpoint.reading import load_weights
from sedd_scale.config import load_config
from sedd_scale.data.shards import Dataset
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import initialize_layout
from tests.distributed.plain_loop import plain_training
from tests.distributed.runs import Run, train_runs
from tests.repository import ROOT
from tests.tolerance import NETWORK

CLIP = 0.5

BASE = (
    "logging.every=1",
    "optimizer.warmup_steps=4",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.cond_dim=40",
    "model.zero_init=false",
    f"optimizer.clip={CLIP}",
)

# name: processes, overrides
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "TP1 PP1": (1, ()),
    "TP1 PP1 recompute": (1, ("parallel.recompute_every=1",)),
    "TP2": (2, ("parallel.tensor=2",)),
    "TP2 SP": (2, ("parallel.tensor=2", "parallel.sequence_parallel=true")),
    "PP2": (2, ("parallel.pipeline=2",)),
    "TP2 selective recompute": (
        2,
        (
            "parallel.tensor=2",
            "parallel.recompute_every=1",
            "parallel.recompute_mode=selective",
        ),
    ),
    "DP2 ZeRO 1": (2, ()),
    "DP2 ZeRO 2": (2, ("parallel.zero_stage=2",)),
    "DP2 ZeRO 3": (2, ("parallel.zero_stage=3",)),
    "DP2 ZeRO 3 recompute": (2, ("parallel.zero_stage=3", "parallel.recompute_every=2")),
    "PP2 DP2 ZeRO 1": (4, ("parallel.pipeline=2",)),
    "TP2 PP2 SP recompute": (
        4,
        (
            "parallel.tensor=2",
            "parallel.pipeline=2",
            "parallel.sequence_parallel=true",
            "parallel.recompute_every=1",
        ),
    ),
    "TP2 DP2 ZeRO 2": (4, ("parallel.tensor=2", "parallel.zero_stage=2")),
    "TP2 DP2 ZeRO 3": (4, ("parallel.tensor=2", "parallel.zero_stage=3")),
}

# name: steps, overrides
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "absorb": (12, ("graph.name=absorb",)),
    "uniform": (8, ("graph.name=uniform", "noise.name=geometric")),
    "absorb bf16": (8, ("graph.name=absorb", "training.precision=bf16")),
}

# Without --full only these layouts train the second and third variant.
CORE = ("TP1 PP1", "TP2 SP", "DP2 ZeRO 3", "PP2 DP2 ZeRO 1", "TP2 DP2 ZeRO 2")

# Keyed dropout and document boundaries are part of the run; these few layouts show it.
DROPOUT = (8, ("graph.name=absorb", "model.dropout=0.2", "model.document_attention=true"))
# Other trunks, with a head tied to the embedding over the stages; one by Muon.
TRUNKS = {
    "rmsnorm, shared heads": (
        6,
        (
            "model.num_heads=4",
            "model.num_kv_heads=2",
            "model.head_dim=6",
            "model.norm=rmsnorm",
            "model.qk_norm=true",
            "model.activation=swiglu",
            "model.ffn_hidden_size=44",
            "model.mlp_bias=false",
            "model.head_bias=false",
            "model.tied_embedding=true",
            "model.adaln_gate_init=one",
            "optimizer.name=muon",
        ),
    ),
    "biases, learned positions": (
        6,
        (
            "model.norm_bias=true",
            "model.qkv_bias=true",
            "model.attention_out_bias=true",
            "model.activation=geglu",
            "model.positions=learned",
            "model.max_positions=32",
            "model.tied_embedding=true",
            "model.conditioning=none",
            "model.time_conditioning=false",
            "model.dropout=0.2",
        ),
    ),
}
TRUNK_LAYOUTS = (
    *("TP1 PP1", "TP2 SP", "TP2 selective recompute", "DP2 ZeRO 3", "PP2 DP2 ZeRO 1"),
    "TP2 PP2 SP recompute",
)
DROPOUT_LAYOUTS = ("TP1 PP1", "TP2 SP", "DP2 ZeRO 1", "TP2 PP2 SP recompute")


@pytest.fixture(scope="module")
def runs(
    dataset: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[tuple[str, str], Run]:
    """Layouts under variants, trained: three launches in all."""
    folder = tmp_path_factory.mktemp("layouts")
    made: dict[tuple[str, str], Run] = {}
    for name, (_, overrides) in LAYOUTS.items():
        variants = dict(VARIANTS)
        if name in DROPOUT_LAYOUTS:
            variants["absorb dropout"] = DROPOUT
        if name in TRUNK_LAYOUTS:
            variants |= TRUNKS
        for variant, (steps, changes) in variants.items():
            shown = name in CORE or variant not in ("uniform", "absorb bf16")
            if not shown and not pytestconfig.getoption("--full"):
                continue
            length = (
                f"training.steps={steps}",
                f"training.valid_every={steps}",
                f"checkpoint.every={steps}",
            )
            made[name, variant] = Run(
                folder / f"{name}, {variant}",
                (f"data.path={dataset}", *BASE, *length, *overrides, *changes),
            )
    for size in sorted({size for size, _ in LAYOUTS.values()}):
        of_size = [run for (name, _), run in made.items() if LAYOUTS[name][0] == size]
        train_runs(size, of_size, folder / f"jobs-{size}.json")
    return made


def relative(found: list[float], expected: list[float]) -> float:
    """Greatest relative difference of two series."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def weights(run: Run, key: str = "master") -> dict[str, torch.Tensor]:
    """A run's final weights, whole, by logical name."""
    layout = initialize_layout()
    config = load_config(ROOT / "configs/runs/tiny.yaml", run.overrides)
    vocab_size = Dataset(str(config.data.path)).vocab_size
    graph = make_graph(config.graph.name, vocab_size)
    network = ScoreNetwork(layer_builders(config, graph, layout))
    parameters = list(logical_parameters(network, layout))
    load_weights(find_checkpoint(run.run_dir), parameters, layout, weights=key)
    found = {logical.name: logical.shard for logical in parameters if logical.shard is not None}
    for name, tensor in found.items():
        # A bias of all keys changes no attention: what it learns is nothing but roundings.
        if name.endswith("linear_qkv.bias"):
            tensor.view(config.trunk.kv_heads, -1, config.trunk.head_dim)[:, -2] = 0.0
    return found


Weights = dict[str, torch.Tensor]


def weight_differences(found: Weights, expected: Weights) -> dict[str, float]:
    """Norm of each tensor's difference, relative to its own."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - value).norm() / value.double().norm())
        for name, value in expected.items()
    }


def weight_difference(found: Weights, expected: Weights) -> float:
    """Greatest difference of a tensor relative to its norm."""
    return max(weight_differences(found, expected).values())


def weight_tolerances(run: Run) -> dict[str, float]:
    """NETWORK, or 16 times what float32 makes of a tensor in the plain loop where that is more.

    Adam divides a gradient by its size. Where that is nothing but roundings, as in rows of the
    embedding under uniform noise, the direction of its steps is the processor's.
    """
    config = load_config(ROOT / "configs/runs/tiny.yaml", run.overrides)
    single, double = (plain_training(config, dtype) for dtype in (torch.float32, torch.float64))
    rounded = weight_differences(single.weights, double.weights)
    return {name: max(NETWORK, 16 * error) for name, error in rounded.items()}


def excess(found: Weights, expected: Weights, tolerances: dict[str, float]) -> float:
    """Greatest difference of a tensor, in units of its tolerance."""
    differences = weight_differences(found, expected)
    return max(differences[name] / tolerances[name] for name in differences)


@pytest.mark.parametrize("variant", ["absorb", "uniform", "absorb dropout", *TRUNKS])
def test_layouts_agree_in_float32(
    runs: dict[tuple[str, str], Run], variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    single = runs["TP1 PP1", variant]
    losses, norms = single.series("loss"), single.series("grad_norm")
    steps = len(losses)
    assert max(norms) > CLIP, "clipping must be active for the comparison to mean something"
    masters, averages = weights(single), weights(single, "ema")
    # The plain loop has one trunk, no dropout and whole sequences; NETWORK serves elsewhere.
    tolerances = weight_tolerances(single) if variant in VARIANTS else {}
    tolerances = tolerances or dict.fromkeys(masters, NETWORK)
    rows = []
    for name in LAYOUTS:
        if (name, variant) not in runs:
            continue
        run = runs[name, variant]
        for key, whole in (("master", masters), ("ema", averages)):
            assert excess(weights(run, key), whole, tolerances) < 1, (name, key)
        rows.append(
            (
                name,
                relative(run.series("loss"), losses),
                relative(run.series("grad_norm"), norms),
                weight_difference(weights(run), masters),
                weight_difference(weights(run, "ema"), averages),
                relative(run.series("valid_nats_per_token"), single.series("valid_nats_per_token")),
            )
        )
    with capsys.disabled():
        print(f"\n{variant}, float32, {steps} steps: greatest relative difference to TP1 PP1")
        print(f"{'layout':<25}{'loss':>10}{'grad norm':>11}{'weights':>10}{'EMA':>10}{'valid':>10}")
        for name, *differences in rows:
            print(f"{name:<25}" + "".join(f"{value:>10.1e}" for value in differences))
    for name, loss, norm, _, _, valid in rows:
        assert max(loss, norm, valid) < NETWORK, name


def test_bf16_follows_float32_under_every_layout(runs: dict[tuple[str, str], Run]) -> None:
    single = runs["TP1 PP1", "absorb"]
    for name, run in ((name, run) for (name, variant), run in runs.items() if "bf16" in variant):
        for key in ("loss", "grad_norm"):
            found = run.series(key)
            assert relative(found, single.series(key)[: len(found)]) < 0.02, name


@pytest.mark.parametrize("variant", ["absorb", "uniform"])
def test_one_process_agrees_with_a_plain_pytorch_loop(
    runs: dict[tuple[str, str], Run], variant: str
) -> None:
    run = runs["TP1 PP1", variant]
    config = load_config(ROOT / "configs/runs/tiny.yaml", run.overrides)
    plain = plain_training(config)
    assert relative(run.series("loss"), plain.losses) < NETWORK
    assert relative(run.series("grad_norm"), plain.grad_norms) < NETWORK
    tolerances = weight_tolerances(run)
    assert excess(weights(run), plain.weights, tolerances) < 1
    assert excess(weights(run, "ema"), plain.averages, tolerances) < 1
