import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sedd_scale.config import load_config
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.diffusion.schedules import schedule_of
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning.flops import head_rows, move_probability, run_seconds, step_flops
from tests.model.small_network import noisy_batch
from tests.repository import ROOT

SHARED_HEADS = ("model.num_kv_heads=2", "model.activation=swiglu", "model.ffn_hidden_size=300")
TINY = ROOT / "configs/runs/tiny.yaml"


def product_flops(
    total: tuple[int, int], left: tuple[int, int], right: tuple[int, int], **_: object
) -> int:
    """Of addmm in place, which adds up the head's gradient; torch's counter has no entry for it."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("graph_name", ["absorb", "uniform"])
@pytest.mark.parametrize(
    ("recompute_every", "recompute_mode", "trunk"),
    [
        (0, "full", ()),
        (2, "full", ()),
        (1, "selective", ()),
        (0, "full", SHARED_HEADS),
        (0, "full", (*SHARED_HEADS, "model.conditioning=none", "model.time_conditioning=false")),
    ],
)
def test_counts_are_torchs_on_the_real_network(
    graph_name: str, recompute_every: int, recompute_mode: str, trunk: tuple[str, ...]
) -> None:
    if "model.conditioning=none" in trunk and graph_name == "uniform":
        trunk = (*trunk, "model.parametrisation=mean")
    vocab_size, batch, length = 300, 2, 32
    config = load_config(
        TINY,
        [
            "model.num_layers=3",
            f"graph.name={graph_name}",
            f"training.global_batch={batch}",
            f"parallel.recompute_every={recompute_every}",
            f"parallel.recompute_mode={recompute_mode}",
            *trunk,
        ],
    )
    graph = make_graph(graph_name, vocab_size)
    builders = layer_builders(config, graph, initialize_layout())
    network = ScoreNetwork(builders).train()
    inputs, targets, _ = noisy_batch(graph, batch=batch, length=length)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_flops})
    with sdpa_kernel(SDPBackend.MATH), counter:  # its products are ordinary ones, all counted
        network(inputs, targets).backward()
    flops = step_flops(config, vocab_size=vocab_size, block_length=length)
    head = 6 * config.model.hidden_size * vocab_size
    rows = len(targets.rows_M)
    predicted = flops.dense - head * (batch * length - rows) + flops.recompute
    # The noise embedding's features have no gradient.
    assert counter.get_total_flops() == pytest.approx(predicted, rel=1e-3)
    assert flops.required == pytest.approx(
        flops.dense - head * batch * length * (1 - flops.head_rows), rel=1e-12
    )


@pytest.mark.parametrize("name", ["loglinear", "geometric", "cosine", "linear"])
def test_share_of_masked_positions_follows_the_schedule(name: str) -> None:
    config = load_config(TINY, [f"noise.name={name}", "noise.t_min=0.01"])
    schedule = schedule_of(config)
    t = torch.linspace(config.noise.t_min, 1, 20_001, dtype=torch.float64)
    move = schedule.move_probability(t)
    for time in (0.01, 0.3, 1.0):
        expected = schedule.move_probability(torch.tensor(time, dtype=torch.float64))
        assert move_probability(config.noise, time) == pytest.approx(float(expected), rel=1e-12)
    assert head_rows(config) == pytest.approx(float(torch.trapezoid(move, t)) / 0.99, abs=1e-6)
    uniform = config.override("graph.name=uniform")
    assert head_rows(uniform) == 1.0


def test_the_small_model_at_forty_percent_of_an_h100() -> None:
    config = load_config(ROOT / "configs/runs/openwebtext_small.yaml")
    flops = step_flops(config, vocab_size=50_257, block_length=1024)
    # 6 FLOPs a parameter of the products and token, attention's 12 L H a layer besides.
    per_token = 6 * (12 * 12 * 768**2 + 0.5 * 768 * 50_257) + 12 * 12 * 1024 * 768
    assert flops.required_per_token == pytest.approx(per_token, rel=2e-3)
    seconds = run_seconds(flops, steps=1, gpus=8, peak=989e12, mfu=0.4)
    assert 512 * 1024 / seconds / 8 == pytest.approx(0.4 * 989e12 / flops.required_per_token)
