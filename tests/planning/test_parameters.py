import pytest

from sedd_scale.config import Config, load_config
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.model.network import ScoreNetwork, layer_builders
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.planning.parameters import count_by_part, layer_shapes, stage_bounds
from tests.repository import ROOT

MODELS = {
    "tiny": ("model.num_layers=3",),
    "uniform": ("graph.name=uniform", "model.num_layers=1"),
    "odd sizes": (
        "model.hidden_size=96",
        "model.num_heads=6",
        "model.num_layers=2",
        "model.cond_dim=40",
        "model.mlp_ratio=3",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("vocab_size", [2, 101])
def test_shapes_are_those_of_the_real_network_in_its_order(name: str, vocab_size: int) -> None:
    config = load_config(ROOT / "configs/runs/tiny.yaml", MODELS[name])
    layout = initialize_layout()
    graph = make_graph(config.graph.name, vocab_size)
    builders = layer_builders(config, graph, layout)
    layers = layer_shapes(config, vocab_size)
    for builder, shapes in zip(builders, layers, strict=True):
        assert [(shape.name, shape.shape, shape.split_dim) for shape in shapes] == [
            (logical.name, logical.shape, logical.partition_dim)
            for logical in logical_parameters(builder(), layout)
        ]
    network = ScoreNetwork(builders)
    total = sum(parameter.numel() for parameter in network.parameters())
    assert sum(count_by_part(layers).values()) == total


@pytest.mark.parametrize(
    ("model", "total"), [("small", 169_627_218), ("medium", 424_477_010), ("7b", 6_957_692_242)]
)
def test_shipped_models_have_the_number_of_parameters_they_state(model: str, total: int) -> None:
    config = load_config(ROOT / f"configs/models/{model}.yaml")
    assert sum(count_by_part(layer_shapes(config, 50_257)).values()) == total


def test_tensor_ranks_share_what_is_split_and_pad_the_vocabulary() -> None:
    config = Config()
    for layer in layer_shapes(config, 50_256):  # V = 50,257 is odd: one row of padding
        for shape in layer:
            shared = shape.local_numel(2) * 2 - shape.numel
            if shape.split_dim is None:
                assert shape.local_numel(2) == shape.numel
            elif shape.name == "head.linear.bias":
                assert shared == 1
            elif shape.part in ("token embedding", "head"):
                assert shared == config.model.hidden_size
            else:
                assert shared == 0


def test_stages_are_cut_as_deepspeed_cuts_them() -> None:
    from deepspeed.runtime.utils import partition_uniform

    for num_layers in range(3, 30):
        for pipeline in range(1, num_layers - 1):
            assert stage_bounds(num_layers, pipeline) == partition_uniform(num_layers, pipeline)


@pytest.mark.parametrize(
    ("name", "vocab_size", "published"),
    [
        ("gpt2", 50_257, 124_439_808),
        ("gpt2_medium", 50_257, 354_823_168),
        ("gpt2_large", 50_257, 774_030_080),
        ("gpt2_xl", 50_257, 1_557_611_200),
        ("llama_1b", 128_256, 1_235_814_400),
        ("llama_8b", 128_256, 8_030_261_248),
        ("qwen3_0.6b", 151_936, 596_049_920),
        ("qwen3_1.7b", 151_936, 1_720_574_976),
        ("qwen3_4b", 151_936, 4_022_468_096),
        ("qwen3_8b", 151_936, 8_190_735_360),
    ],
)
def test_a_family_has_its_published_parameters_and_a_mask(
    name: str, vocab_size: int, published: int
) -> None:
    path = ROOT / f"configs/models/{name}.yaml"
    config = load_config(path)
    total = sum(count_by_part(layer_shapes(config, vocab_size)).values())
    rows = 1 if config.model.tied_embedding else 2
    assert total == published + rows * config.model.hidden_size
    assert f"{total:,} parameters" in path.read_text()
