import pytest
import torch
from torch import Tensor

from sedd_scale.config import Config, load_config
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.parallel import vocab
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning import activations
from sedd_scale.planning.activations import stage_activations
from tests.distributed.runs import REPOSITORY
from tests.model.small_network import noisy_batch

VOCAB_SIZE, BATCH, LENGTH = 60, 2, 64


def config_of(*overrides: str) -> Config:
    sizes = (
        "model.hidden_size=128",
        "model.num_layers=4",
        f"training.micro_batch={BATCH}",
        f"data.block_length={LENGTH}",
    )
    return load_config(REPOSITORY / "configs/runs/tiny.yaml", [*sizes, *overrides])


def predicted(config: Config, *, layers: range, in_flight: int = 1) -> int:
    return stage_activations(
        config,
        vocab_size=VOCAB_SIZE,
        block_length=LENGTH,
        stage=0,
        layers=layers,
        in_flight=in_flight,
    ).kept


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.precision=fp32",),
        ("training.precision=fp32", "model.dropout=0.1"),
        ("training.precision=bf16", "model.dropout=0.1"),
        ("training.precision=bf16", "model.residual_dtype=bf16"),
        ("training.precision=bf16", "parallel.recompute_every=1"),
        ("training.precision=bf16", "parallel.recompute_every=2", "model.dropout=0.1"),
        ("training.precision=bf16", "parallel.recompute_every=3", "model.residual_dtype=bf16"),
    ],
    ids=" ".join,
)
def test_kept_bytes_are_what_autograd_saves(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides)
    graph = make_graph("absorb", VOCAB_SIZE)
    builders = layer_builders(
        config.model,
        graph,
        initialize_layout(),
        scaled=True,
        recompute_every=config.parallel.recompute_every,
    )
    network = ScoreNetwork(builders)
    if config.training.precision == "bf16":
        network.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    saved: dict[int, int] = {}
    alive = []  # a storage freed and used again would hide one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs, _, _ = noisy_batch(graph, batch=BATCH, length=LENGTH)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = network.head(network._stream(inputs))
    assert hidden.requires_grad
    expected = predicted(config, layers=range(config.model.num_layers + 2))
    assert expected == pytest.approx(sum(saved.values()), rel=0.1)


def test_stages_and_micro_batches_in_flight_add_up() -> None:
    config = config_of()
    whole = predicted(config, layers=range(6))
    assert predicted(config, layers=range(3)) + predicted(config, layers=range(3, 6)) == whole
    assert predicted(config, layers=range(6), in_flight=3) == 3 * whole


def test_sequence_parallelism_splits_everything() -> None:
    alone = predicted(config_of(), layers=range(6))
    tensor = predicted(config_of("parallel.tensor=2"), layers=range(6))
    split = ("parallel.tensor=2", "parallel.sequence_parallel=true")
    assert predicted(config_of(*split), layers=range(6)) == alone / 2 < tensor < alone


def test_chunks_of_the_loss_are_those_of_the_loss() -> None:
    shard = vocab.VocabShard(
        graph=make_graph("absorb", 10), scaled=True, start=0, length=10, group=None
    )
    for rows in (11, 50_258, 10**8):
        chunk = activations.CHUNK_BYTES // (4 * rows)
        assert shard.chunk_rows(rows) == max(activations.MIN_CHUNK_ROWS, chunk)
