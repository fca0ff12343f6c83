"""The configuration tree: shipped files, composition, overrides, and everything it refuses."""

import dataclasses
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import yaml

from sedd_scale.config import Config, config_from_dict, load_config
from sedd_scale.config.sections import FREE, NETWORK, ORDER, TASK
from sedd_scale.errors import ConfigError
from tests.repository import CONFIGS

# Every shipped file with the numbers of processes it is meant for; None: a part of a run.
WORLD_SIZES: dict[str, list[int | None]] = {
    "data/openwebtext.yaml": [None],
    "models/tiny.yaml": [None],
    "models/small.yaml": [None],
    "models/medium.yaml": [None],
    "models/large.yaml": [None],
    "models/xl.yaml": [None],
    "models/7b.yaml": [None],
    **{
        f"models/{name}.yaml": [None]
        for name in (
            *("gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl", "llama_1b", "llama_8b"),
            *("qwen3_0.6b", "qwen3_1.7b", "qwen3_4b", "qwen3_8b", "qwen3_small"),
        )
    },
    "runs/tiny.yaml": [1, 2, 4],
    "runs/quickstart.yaml": [2],
    "runs/openwebtext_small.yaml": [1, 8],
    "runs/openwebtext_small_uniform.yaml": [1, 8],
    "runs/openwebtext_medium.yaml": [8],
    "runs/openwebtext_large.yaml": [16],
    "runs/openwebtext_xl.yaml": [32],
    "runs/openwebtext_7b.yaml": [64],
    "runs/adapt_qwen3_0.6b.yaml": [8],
}


def sentences() -> dict[str, str]:
    """Sentence of every section and, under its dotted name, of every key."""
    found = {}
    for section in fields(Config):
        found[section.name] = section.metadata["sentence"]
        for key in fields(section.type):  # type: ignore[arg-type]
            found[f"{section.name}.{key.name}"] = key.metadata["sentence"]
    return found


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_shipped_file_is_in_the_table():
    shipped = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    experiments = {name for name in shipped if name.startswith("experiments/")}
    assert shipped - experiments == set(WORLD_SIZES)  # tests/experiments has a test for those


@pytest.mark.parametrize(
    ("name", "world_size"), [(n, size) for n, sizes in WORLD_SIZES.items() for size in sizes]
)
def test_shipped_file_is_valid(name: str, world_size: int | None):
    load_config(CONFIGS / name).validate(world_size)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("small", (768, 12, 12)),
        ("medium", (1024, 24, 16)),
        ("large", (1280, 36, 20)),
    ],
)
def test_shipped_model_has_the_published_shape(name: str, shape: tuple[int, int, int]):
    model = load_config(CONFIGS / "models" / f"{name}.yaml").model
    assert (model.hidden_size, model.num_layers, model.num_heads) == shape
    run = load_config(CONFIGS / "runs" / f"openwebtext_{name}.yaml").model
    assert dataclasses.replace(run, residual_dtype=model.residual_dtype) == model


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_tiny_run_fits_every_layout_of_four_processes(tensor: int, pipeline: int):
    overrides = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    load_config(CONFIGS / "runs/tiny.yaml", overrides).validate(4)


def test_quickstart_resumes_data_parallel():
    load_config(CONFIGS / "runs/quickstart.yaml", ["parallel.tensor=1"]).validate(2)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shipped_keys_carry_their_sentence(name: str):
    """Each section and key stands under a comment that is its dataclass sentence, word for word."""
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    section, checked = "", 0
    for above, line in zip(["", *lines], lines):
        text = line.strip()
        if not text or text.startswith(("#", "- ", "base:")):
            continue
        key = text.partition(":")[0]
        section = section if line.startswith(" ") else key
        dotted = f"{section}.{key}" if line.startswith(" ") else key
        assert above.strip() == f"# {sentences()[dotted]}", f"{name}: {dotted}"
        checked += 1
    assert checked >= 2


def test_every_sentence_is_one_line_that_ends():
    for name, sentence in sentences().items():
        assert sentence.endswith(".") and "\n" not in sentence, name
        assert len(f"  # {sentence}") <= 100, name


def test_defaults_are_the_papers_recipe():
    config = Config()
    config.validate(8)
    assert config.resolved_scale_by_sigma
    assert config.trunk.head_dim == 64
    assert (config.data_parallel(8), config.accumulation(8)) == (8, 8)
    assert not config.override("graph.name=uniform").resolved_scale_by_sigma
    assert not config.override("model.scale_by_sigma=false").resolved_scale_by_sigma


# --- reading and writing


def test_yaml_loads_back_equal(tmp_path: Path):
    config = Config().override(
        "logging.wandb=off",
        "logging.wandb_name=a: b # 'c' \u2028 é",
        "logging.wandb_project=null",
        "optimizer.eps=1e-22",
        "data.path=123",
        "training.resume=no",
    )
    text = config.to_yaml()
    assert load_config(write(tmp_path / "config.yaml", text)) == config
    # Readers of YAML 1.1 see the same values.
    assert yaml.safe_load(text) == config.to_dict()
    for name, sentence in sentences().items():
        assert f"# {sentence}\n" in text, name


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_shipped_file_survives_both_round_trips(name: str, tmp_path: Path):
    config = load_config(CONFIGS / name)
    assert config_from_dict(config.to_dict()) == config
    assert load_config(write(tmp_path / "config.yaml", config.to_yaml())) == config


def test_config_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        Config().model.hidden_size = 2  # type: ignore[misc]


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path):
    text = (
        "optimizer: {lr: 1e-3, eps: 1E-9, clip: 2}\n"
        "logging: {wandb: off, wandb_name: ~}\n"
        "training: {steps: 010}\nmodel: {zero_init: false}\n"
    )
    config = load_config(write(tmp_path / "config.yaml", text))
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.clip) == (1e-3, 1e-9, 2.0)
    assert isinstance(config.optimizer.clip, float)
    assert (config.logging.wandb, config.logging.wandb_name) == ("off", None)
    assert config.training.steps == 10
    assert config.model.zero_init is False


def test_overrides_are_typed_and_come_last(tmp_path: Path):
    path = write(tmp_path / "config.yaml", "training: {steps: 7}\ndata: {path: here}\n")
    overrides = ["training.steps=50", "optimizer.lr=1e-3", "training.steps=60", "data.path=/a=b: c"]
    config = load_config(path, overrides)
    assert (config.training.steps, config.optimizer.lr) == (60, 1e-3)
    assert config.data.path == "/a=b: c"
    assert config.override("data.path=null").data.path is None


def test_bases_compose_in_order(tmp_path: Path):
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts/root.yaml", "model: {hidden_size: 8, num_heads: 2, num_layers: 1}\n")
    write(tmp_path / "parts/wide.yaml", "base: root.yaml\nmodel: {hidden_size: 16}\n")
    write(tmp_path / "parts/deep.yaml", "base: root.yaml\nmodel: {num_layers: 9}\n")
    path = write(
        tmp_path / "run.yaml",
        "base: [parts/wide.yaml, parts/deep.yaml]\nmodel:\n  num_heads: 4\noptimizer:\n",
    )
    model = load_config(path).model
    # deep.yaml repeats its own base after wide.yaml, so its hidden_size is the later one.
    assert (model.hidden_size, model.num_layers, model.num_heads) == (8, 9, 4)


def test_a_base_may_be_a_shipped_file_unless_there_is_one_beside(tmp_path: Path):
    path = write(tmp_path / "run.yaml", "base: configs/models/tiny.yaml\n")
    shipped = load_config("configs/models/tiny.yaml")
    assert load_config(path) == shipped
    (tmp_path / "configs/models").mkdir(parents=True)
    write(tmp_path / "configs/models/tiny.yaml", "model: {num_heads: 3}\n")
    assert load_config(path) == Config().override("model.num_heads=3") != shipped


# --- refusals: what is written, and what the message has to name

UNREADABLE = [
    ("", ["is empty"]),
    ("# only a comment\n", ["is empty"]),
    ("- a\n- b\n", ["list", "sections"]),
    ("model: {hidden_size: 3\n", ["line", "YAML"]),
    ("model:\n  dropout: 0.1\n  dropout: 0.2\n", ["line 3", "dropout", "twice"]),
    ("model: 3\n", ["model=3", "section"]),
    ("base: 3\n", ["base=3"]),
    ("base: nowhere.yaml\n", ["nowhere.yaml", "no such"]),
    ("modle: {dropout: 0.1}\n", ["unknown section modle", "model?"]),
    ("dropout: 0.1\n", ["unknown section dropout", "model.dropout?"]),
    ("model: {hiden_size: 3}\n", ["unknown key model.hiden_size", "model.hidden_size?"]),
    ("model: {tensor: 3}\n", ["unknown key model.tensor", "parallel.tensor?"]),
    ("model: {hidden_size: 8.5}\n", ["model.hidden_size=8.5", "an integer"]),
    ("model: {hidden_size: true}\n", ["model.hidden_size=true", "an integer"]),
    ("model: {hidden_size: null}\n", ["model.hidden_size=null", "an integer"]),
    ("model: {vocab_size: many}\n", ["model.vocab_size=many", "an integer or null"]),
    ("model: {zero_init: 1}\n", ["model.zero_init=1", "true or false"]),
    ("optimizer: {lr: fast}\n", ["optimizer.lr=fast", "a number"]),
    ("optimizer: {lr: .nan}\n", ["optimizer.lr=nan", "a number"]),
    ("optimizer: {clip: 1e999}\n", ["optimizer.clip=inf", "a number"]),
    ("graph: {name: [absorb]}\n", ["graph.name", "a string"]),
]


@pytest.mark.parametrize(("text", "named"), UNREADABLE)
def test_unreadable_file_is_refused(text: str, named: list[str], tmp_path: Path):
    path = write(tmp_path / "config.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for part in ["config.yaml", *named]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_file_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: byte 7 "):
        load_config(path)
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such"):
        load_config(tmp_path / "gone.yaml")


def test_circle_of_bases_is_refused(tmp_path: Path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: [c.yaml]\n")
    write(tmp_path / "c.yaml", "base: b.yaml\n")
    with pytest.raises(ConfigError, match=r"circle .*b\.yaml -> .*c\.yaml -> .*b\.yaml"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.steps", ["section.key=value"]),
        ("training.step=5", ["unknown key training.step", "training.steps?"]),
        ("steps=5", ["unknown key steps", "training.steps?"]),
        ("=5", ["unknown key"]),
        ("training.steps=5.0", ["training.steps=5.0", "an integer"]),
        ("training.steps=", ["training.steps=null", "an integer"]),
        ("training.steps=[", ["YAML"]),
    ],
)
def test_bad_override_is_refused(override: str, named: list[str]):
    with pytest.raises(ConfigError) as error:
        Config().override(override)
    for part in [repr(override), *named]:
        assert part in str(error.value)


# Overrides of the defaults; number of processes; what the message has to name besides them.
ILLEGAL: list[tuple[list[str], int | None, list[str]]] = [
    (["model.num_heads=7"], None, ["model.hidden_size=768"]),
    (["model.num_heads=256"], None, ["model.hidden_size=768", "odd width 3"]),
    (["parallel.tensor=8"], 8, ["model.num_heads=12"]),
    (["model.num_kv_heads=5"], None, ["model.num_heads=12"]),
    (["model.num_kv_heads=2", "parallel.tensor=4"], 4, ["model.num_kv_heads=2"]),
    (["model.ffn_hidden_size=50", "parallel.tensor=4"], 4, ["model.ffn_hidden_size=50"]),
    (["model.head_dim=63"], None, ["make it even"]),
    (["model.positions=learned"], None, ["set model.max_positions"]),
    (
        ["model.positions=learned", "model.max_positions=8", "data.block_length=9"],
        None,
        ["data.block_length=9"],
    ),
    (["model.rotary_scaling=yarn"], None, ["set model.rotary_original_length"]),
    (["model.conditioning=none"], None, ["set model.time_conditioning=false"]),
    (["parallel.pipeline=13"], 13, ["model.num_layers=12"]),
    (["parallel.pipeline=2", "parallel.zero_stage=2"], 2, ["parallel.zero_stage=1"]),
    (["parallel.pipeline=2", "parallel.zero_stage=3"], 2, ["parallel.zero_stage=1"]),
    (["parallel.zero_stage=0"], None, ["1, 2, 3"]),
    (["parallel.zero_stage=4"], None, ["1, 2, 3"]),
    (["parallel.tensor=2"], 3, ["3 processes", "parallel.pipeline=1", "multiple of 2"]),
    (["parallel.tensor=2", "parallel.pipeline=2"], 2, ["2 processes", "multiple of 4"]),
    ([], 0, ["0 processes"]),
    (["training.micro_batch=48"], None, ["training.global_batch=512"]),
    (
        ["training.global_batch=20", "training.micro_batch=4"],
        2,
        ["2 data-parallel ranks", "training.global_batch=16"],
    ),
    (
        ["training.global_batch=4", "training.micro_batch=4"],
        2,
        ["set training.global_batch=8"],
    ),
    (["parallel.sequence_parallel=true"], 2, ["parallel.tensor=1"]),
    (
        ["parallel.sequence_parallel=true", "parallel.tensor=2", "data.block_length=1023"],
        2,
        [],
    ),
    (["parallel.recompute_every=13"], None, ["model.num_layers=12"]),
    (["parallel.recompute_every=-1"], None, ["at least 0"]),
    (["graph.name=uniform", "model.scale_by_sigma=true"], None, ["model.scale_by_sigma=null"]),
    (["model.time_conditioning=false", "graph.name=uniform"], None, ["graph.name=absorb"]),
    (
        ["model.parametrisation=mean", "model.scale_by_sigma=false"],
        None,
        ["learns normalised scores", "model.scale_by_sigma=null"],
    ),
    (
        ["model.parametrisation=mean", "training.objective=d3pm_absorb"],
        None,
        ["no effect", "training.objective=score_entropy"],
    ),
    (
        ["model.time_conditioning=false", "graph.name=uniform"],
        None,
        ["model.parametrisation=mean"],
    ),
    (
        ["training.weight_softening=0.1", "training.objective=autoregressive"],
        None,
        ["training.objective=score_entropy"],
    ),
    (["model.rotary_base=0.5"], None, ["at least 1", "0 for no positions"]),
    (
        ["model.time_conditioning=false", "model.scale_by_sigma=false"],
        None,
        ["graph.name=absorb", "model.scale_by_sigma=true"],
    ),
    (["graph.name=absorbing"], None, ["did you mean absorb?"]),
    (["graph.name=unifrom"], None, ["did you mean uniform?"]),
    (["noise.name=log-linear"], None, ["did you mean loglinear?"]),
    (["noise.name=geometric", "noise.sigma_min=20"], None, ["noise.sigma_max=20.0"]),
    (["noise.sigma_min=0"], None, ["above 0"]),
    (["noise.eps=0"], None, ["above 0"]),
    (["noise.eps=1"], None, ["below 1"]),
    (["noise.t_min=0"], None, ["above 0"]),
    (["noise.t_min=1"], None, ["below 1"]),
    (["model.attention=flesh"], None, ["did you mean flash?"]),
    (["model.attention=flash", "training.precision=fp32"], None, ["model.attention=sdpa"]),
    (["model.residual_dtype=bf16", "training.precision=fp32"], None, ["precision=bf16"]),
    (["model.residual_dtype=fp16"], None, ["fp32, bf16"]),
    (["model.hidden_size=0"], None, ["at least 1"]),
    (["model.num_layers=0"], None, ["at least 1"]),
    (["model.vocab_size=1"], None, ["at least 2"]),
    (["model.dropout=1"], None, ["below 1"]),
    (["model.dropout=-0.1"], None, ["at least 0"]),
    (["optimizer.lr=0"], None, ["above 0"]),
    (["optimizer.clip=0"], None, ["above 0"]),
    (["optimizer.beta1=1"], None, ["below 1"]),
    (["optimizer.beta2=-1"], None, ["at least 0"]),
    (["optimizer.ema_decay=1"], None, ["below 1"]),
    (["optimizer.warmup_steps=-1"], None, ["at least 0"]),
    (["optimizer.schedule=linear"], None, ["constant, cosine, wsd"]),
    (["optimizer.schedule=wsd"], None, ["optimizer.decay_steps=0"]),
    (["optimizer.decay_steps=5"], None, ["optimizer.schedule=constant"]),
    (["optimizer.min_lr_ratio=0.1"], None, ["optimizer.schedule=constant"]),
    (
        ["optimizer.schedule=wsd", "optimizer.decay_steps=6", "training.steps=2505"],
        None,
        ["optimizer.warmup_steps=2500"],
    ),
    (["optimizer.schedule=cosine", "training.steps=2500"], None, ["warmup_steps=2500"]),
    (["training.steps=0"], None, ["at least 1"]),
    (["training.seed=-1"], None, ["at least 0"]),
    (["training.precision=fp8"], None, ["fp32, bf16"]),
    (["training.resume="], None, ["auto, never or a path"]),
    (["logging.every=0"], None, ["at least 1"]),
    (["logging.wandb=on"], None, ["did you mean online?"]),
    (["checkpoint.every=0"], None, ["at least 1"]),
    (["checkpoint.keep=-1"], None, ["at least 0"]),
]


@pytest.mark.parametrize(("overrides", "world_size", "named"), ILLEGAL)
def test_illegal_combination_is_refused(
    overrides: list[str], world_size: int | None, named: list[str]
):
    """The message names each key that was set, its value, and what the table adds."""
    config = Config().override(*overrides)
    with pytest.raises(ConfigError) as error:
        config.validate(world_size)
    message = str(error.value)
    for part in [*(override.partition("=")[0] for override in overrides), *named]:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["parallel.sequence_parallel=true", "parallel.tensor=2", "data.block_length=1024"], 2),
        (["parallel.sequence_parallel=true", "parallel.tensor=2"], 2),
        (["parallel.pipeline=12"], 12),
        (["parallel.recompute_every=12"], 1),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=5", "training.steps=2505"], 1),
        (["optimizer.schedule=cosine", "training.steps=2501", "optimizer.min_lr_ratio=0.1"], 1),
        (["training.steps=1"], 1),
        (["noise.sigma_min=20"], 1),
        (["graph.name=uniform", "model.scale_by_sigma=false"], 1),
        (["model.time_conditioning=false"], 1),
        (["model.rotary_base=1"], 1),
        (["training.weight_softening=0.1", "training.objective=masked_cross_entropy"], 1),
        (["model.parametrisation=mean", "graph.name=uniform", "model.time_conditioning=false"], 1),
        (["model.parametrisation=mean", "model.time_conditioning=false"], 1),
        (["model.parametrisation=mean", "model.scale_by_sigma=true"], 1),
        (["model.rotary_base=0"], 1),
        (["training.resume=runs/old/checkpoints/step-5"], 1),
    ],
)
def test_neighbours_of_the_illegal_are_legal(overrides: list[str], world_size: int):
    Config().override(*overrides).validate(world_size)


def test_flash_attention_needs_its_package(monkeypatch: pytest.MonkeyPatch):
    config = Config().override("model.attention=flash")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.attention=flash needs the package flash-attn"):
        config.validate()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    config.validate()


def test_config_from_dict_takes_defaults_and_refuses_strangers():
    config = config_from_dict({"model": {"dropout": 0}})
    assert config == Config().override("model.dropout=0.0")
    with pytest.raises(ConfigError, match=r"unknown key model\.drop; did you mean model\.dropout"):
        config_from_dict({"model": {"drop": 0}})


def test_every_key_that_shapes_a_model_or_its_task_says_what_it_belongs_to() -> None:
    """A checkpoint with another value is refused; a new key of these sections has to be decided."""
    of_kind: dict[str, set[str]] = {}
    for key, field, _ in Config().all_keys():
        of_kind.setdefault(field.metadata["shared"], set()).add(key)
    assert set(of_kind) == {NETWORK, TASK, ORDER, FREE}
    shaping = {key for key in of_kind[FREE] if key.split(".")[0] in ("model", "graph", "noise")}
    # How it computes and starts, not what it is.
    assert shaping == {
        *("model.dropout", "model.vocab_size", "model.attention", "model.residual_dtype"),
        *("model.zero_init", "model.init_from", "model.init_options"),
        *("model.grow_vocab", "model.adaln_gate_init", "model.calibrate_head"),
    }


def test_keys_that_another_key_puts_out_of_effect_are_refused() -> None:
    """Each as its metadata says, set to another value than its default."""
    others = {"training.weight_softening": 0.5, "optimizer.decay_steps": 10}
    others |= {"model.max_positions": 10, "model.rotary_original_length": 10}
    others |= {"optimizer.muon_momentum": 0.5}
    others |= {"training.anneal_steps": 10, "model.calibrate_head": "true"}
    found = [(key, field) for key, field, _ in Config().all_keys() if field.metadata["only_with"]]
    assert len(found) >= 5
    for key, field in found:
        value = others.get(key)
        if field.metadata["choices"]:
            value = next(one for one in field.metadata["choices"] if one != field.default)
        elif value is None:
            value = 2 * field.default if field.default else 0.1
        for other, needed in field.metadata["only_with"].items():
            choices = {one: f.metadata["choices"] for one, f, _ in Config().all_keys()}[other]
            refused = next(choice for choice in choices or (False,) if choice not in needed)
            with pytest.raises(ConfigError, match=f"{key}={value} has no effect with {other}="):
                Config().override(f"{key}={value}", f"{other}={refused}").validate()
