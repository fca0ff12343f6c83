"""Models of transformers: their logits, their bytes again, and what is refused."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sedd_scale.config import Config, load_config
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.convert import convert
from sedd_scale.interop.formats import detect_format, open_checkpoint
from sedd_scale.interop.huggingface import HuggingFaceSource
from sedd_scale.interop.huggingface_config import config_of, raw_of
from sedd_scale.interop.huggingface_names import Held, our_rows, their_rows
from sedd_scale.interop.initial_weights import InitialWeights, check_causal_start
from sedd_scale.interop.native import NativeSource
from sedd_scale.interop.pretrained import load_pretrained, save_pretrained
from sedd_scale.interop.same_network import differences
from sedd_scale.interop.sedd_names import VOCABULARY_PARAMETERS
from sedd_scale.interop.verify import verify
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.preparation.prepare import prepare
from sedd_scale.tokenizers.opening import load_tokenizer, open_tokenizer
from sedd_scale.training.loop import open_dataset, train
from tests.data.corpus import make_texts, write_jsonl
from tests.repository import ROOT
from tests.tokenizers.hf_files import byte_level, write_files

ROWS = 403  # three more than the tokenizer has tokens
SIZES = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}


def model_of(name: str) -> Any:
    import transformers

    def made(kind: str, head: str = "ForCausalLM", **values: Any) -> Any:
        config = getattr(transformers, f"{kind}Config")(**values)
        return getattr(transformers, kind + head)(config)

    torch.manual_seed(0)
    gpt2 = {"vocab_size": ROWS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = {
        "gpt2": lambda: made("GPT2", "LMHeadModel", **gpt2),
        "gpt2 untied": lambda: made("GPT2", "LMHeadModel", **gpt2, tie_word_embeddings=False),
        "llama": lambda: made("Llama", **SIZES, attention_bias=True, mlp_bias=True),
        "llama 3": lambda: made("Llama", **SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
        "llama, yarn": lambda: made("Llama", **SIZES, rope_parameters=YARN),
        "mistral": lambda: made("Mistral", **SIZES, sliding_window=None),
        "qwen2": lambda: made("Qwen2", **SIZES, tie_word_embeddings=True),
        "qwen3": lambda: made("Qwen3", **SIZES, head_dim=16),
    }[name]()
    with torch.no_grad():  # norms and biases begin as ones and zeros
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


NAMES = (*("gpt2", "gpt2 untied", "llama", "llama 3", "llama, yarn", "mistral", "qwen2", "qwen3"),)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model by its name, with a tokenizer; made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            path = made[name] = tmp_path_factory.mktemp("model")
            dtype = torch.bfloat16 if name == "qwen2" else torch.float32
            model_of(name).to(dtype).save_pretrained(path)
            write_files(path, byte_level())
        return made[name]

    return folder


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_equal_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        bits = [one.contiguous().flatten().view(torch.uint8) for one in (tensor, right[name])]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(folders: Callable[[str], Path], name: str) -> None:
    """Of float32 weights, at every position and of every token but the mask."""
    import transformers

    tokens = torch.randint(0, ROWS, (2, 60), generator=torch.Generator().manual_seed(2))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folders(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = load_pretrained(folders(name), device="cpu")
    assert ours.causal and ours.tokenizer is not None and ours.block_length == 64
    with torch.no_grad():
        logits_BLN = theirs(tokens).logits
        hidden_LBH = ours.network.hidden(tokens, torch.zeros(2))
        rows_MH = hidden_LBH.transpose(0, 1).flatten(0, 1)
        plain_MV = rows_MH @ ours.network.head.linear.weight[: ROWS + 1].T
        of_law_MV = ours.logits_of(rows_MH)
    wanted_MN = logits_BLN.flatten(0, 1)
    assert float((plain_MV[:, :ROWS] - wanted_MN).abs().max() / wanted_MN.abs().max()) < 1e-5
    # These have another constant for each row.
    found_MN, wanted_MN = (logits[:, :ROWS].log_softmax(1) for logits in (of_law_MV, wanted_MN))
    assert float((found_MN - wanted_MN).abs().max() / wanted_MN.abs().max()) < 1e-5
    log_p_BLN = wanted_MN.view(2, 60, ROWS)[:, :-1]
    nats_B = -log_p_BLN.gather(2, tokens[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(ours.loss(tokens).detach(), nats_B, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_has_the_same_bits(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Directly and by way of a run directory of ours."""
    source = folders(name)
    convert("hf", "hf-causal", source, tmp_path / "direct")
    convert("hf", "native", source, tmp_path / "native")
    assert detect_format(tmp_path / "native") == "native"
    convert("native", "hf-causal", tmp_path / "native", tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    for path in (tmp_path / "direct", tmp_path / "back"):
        assert_equal_bits(tensors_of(source), tensors_of(path))
        kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        for file in (*kept, "chat_template.jinja"):
            assert (path / file).read_bytes() == (source / file).read_bytes(), file
    assert (
        load_tokenizer(next((tmp_path / "native").glob("checkpoints/step-*/tokenizer"))).fingerprint
        == open_tokenizer(source).fingerprint
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_nothing_is_remembered_of_is_the_same_network(
    folders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """As of a run of ours: transformers reads it and computes the same."""
    import transformers

    source = folders(name)
    convert("hf", "native", source, tmp_path / "native", weights="ema")
    convert("native", "hf-causal", tmp_path / "native", tmp_path / "back")
    tokens = torch.randint(0, ROWS, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (source, tmp_path / "back")
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


def test_rows_are_in_the_groups_that_share_keys() -> None:
    config = config_of(Path("c"), model_of("qwen3").config.to_dict() | {"architectures": None})
    trunk = config.trunk
    q, k, v = (
        torch.full((heads * 16, 3), 100.0 * part)
        + torch.arange(heads).repeat_interleave(16)[:, None]
        for part, heads in enumerate((4, 2, 2))
    )
    name = "blocks.0.attention.linear_qkv.weight"
    held = [Held(name, part) for part in "qkv"]
    whole = our_rows(dict(zip(held, (q, k, v))), (trunk.qkv_rows, 3), trunk)
    assert whole[::16, 0].tolist() == [0, 1, 100, 200, 2, 3, 101, 201]
    for of, rows in zip(held, (q, k, v)):
        assert torch.equal(their_rows(of, whole, trunk), rows)
    joint = Held(name, "qkv", turned=True)
    assert torch.equal(their_rows(joint, whole, trunk), torch.cat([q, k, v]).T)
    assert torch.equal(our_rows({joint: torch.cat([q, k, v]).T}, whole.shape, trunk), whole)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_row_of_the_mask(folders: Callable[[str], Path], name: str) -> None:
    """As the others are on average, and as far from that; the same whenever it is read."""
    rows = [open_checkpoint(folders(name)).read("embedding.tokens.weight", "ema") for _ in "ab"]
    assert torch.equal(*rows)
    others, mask = rows[0][:-1].double(), rows[0][-1].double()
    assert len(others) == ROWS
    away = (mask - others.mean(0)) / others.std(0, correction=0)
    noise = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(away, noise, rtol=1e-4, atol=1e-4)
    if name == "qwen3":
        head = open_checkpoint(folders(name)).read("head.linear.weight", "ema")
        assert not head[-1].any() and head[:-1].any()


def test_what_no_output_depends_on_is_not_compared(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """A mask's rows, which training moves and an export leaves out."""
    model = load_pretrained(folders("qwen3"), device="cpu")
    with torch.no_grad():
        for logical in logical_parameters(model.network, initialize_layout()):
            if logical.name in VOCABULARY_PARAMETERS:
                assert logical.shard is not None
                logical.shard[ROWS] += 1.0
    save_pretrained(model, tmp_path / "moved", format="native")
    convert("native", "hf-causal", tmp_path / "moved", tmp_path / "back")
    found = verify(tmp_path / "moved", tmp_path / "back")
    assert (found.max_difference, found.num_scores) == (0.0, 3 * 64 * ROWS)
    masked = load_pretrained(folders("qwen3"), device="cpu")
    masked.config = masked.config.override("training.objective=masked_cross_entropy")
    save_pretrained(masked, tmp_path / "masked", format="native")
    with pytest.raises(CheckpointError, match="attention is causal and to both sides"):
        verify(tmp_path / "back", tmp_path / "masked")


def test_both_spellings_are_one_network(folders: Callable[[str], Path]) -> None:
    for name in NAMES:
        raw = json.loads((folders(name) / "config.json").read_text())
        config = config_of(Path("c"), raw)
        older = raw_of(config, block_length=64)
        assert not differences(config, config_of(Path("c"), older))
        assert "rope_parameters" not in older
        rope = raw.pop("rope_parameters", None)
        if rope is not None:
            raw["rope_theta"] = rope.pop("rope_theta")
            kind = rope.pop("rope_type")
            raw["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
            assert config_of(Path("c"), raw) == config


def test_values_are_those_of_the_file(folders: Callable[[str], Path]) -> None:
    model = open_checkpoint(folders("qwen3")).described.config.model
    assert (model.num_kv_heads, model.head_dim, model.qk_norm) == (2, 16, True)
    assert (model.norm, model.activation, model.tied_embedding) == ("rmsnorm", "swiglu", False)
    described = open_checkpoint(folders("llama 3")).described
    assert (described.num_tokens, described.block_length) == (ROWS, 64)
    model = described.config.model
    assert (model.rotary_scaling, model.rotary_factor, model.rotary_base) == ("llama3", 8.0, 5e5)
    assert (model.rotary_low, model.rotary_high, model.rotary_original_length) == (1.0, None, 16)
    assert model.conditioning == "none" and not model.head_bias and model.tied_embedding
    model = open_checkpoint(folders("gpt2")).described.config.model
    assert (model.positions, model.max_positions, model.norm_bias) == ("learned", 64, True)


def test_older_files(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Names without their first word, masks beside the weights, a tied head written again."""
    source = shutil.copytree(folders("gpt2"), tmp_path / "source")
    tensors = {n.removeprefix("transformer."): t for n, t in tensors_of(source).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    (source / "model.safetensors").unlink()
    torch.save(tensors | {"lm_head.weight": tensors["wte.weight"]}, source / "pytorch_model.bin")
    opened, plain = open_checkpoint(source), open_checkpoint(folders("gpt2"))
    for name in plain.shapes:
        assert torch.equal(opened.read(name, "ema"), plain.read(name, "ema"))
    convert("hf", "hf-causal", source, tmp_path / "back")
    written = tensors_of(tmp_path / "back")
    del tensors["h.0.attn.bias"]
    assert_equal_bits(written, tensors | {"lm_head.weight": tensors["wte.weight"]})
    torch.save(
        tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, source / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"has a head of its own .* set that to false"):
        open_checkpoint(source)


def edited(folder: Path, target: Path, **values: Any) -> Path:
    """A copy whose config.json has other values; None removes a key."""
    shutil.copytree(folder, target)
    raw = json.loads((target / "config.json").read_text()) | values
    raw = {key: value for key, value in raw.items() if value != "remove"}
    (target / "config.json").write_text(json.dumps(raw))
    return target


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another architecture": (
        "llama",
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        "says model_type=gemma2: models of llama, mistral, qwen2, qwen3, gpt2 can be read",
    ),
    "code of its own": (
        "llama",
        {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}},
        r"says model_type=own, which needs code of its own \(auto_map\)",
    ),
    "code of its own for a known kind": (
        "qwen2",
        {"auto_map": {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.Qwen2ForCausalLM"}},
        "auto_map=.AutoModelForCausalLM., .*: its code may differ; take it out if that",
    ),
    "no causal model": (
        "qwen3",
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "has no config.json of a language model of transformers: fetch it, or use --from mdlm",
    ),
    "no language model": ("qwen3", {"architectures": ["Qwen3Model"]}, "is no language model"),
    "exact gelu": ("gpt2", {"activation_function": "gelu"}, "activation_function=.gelu., a net"),
    "relu": ("llama", {"hidden_act": "relu"}, "hidden_act=.relu., a network that cannot be read"),
    "scaled by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=true, a network that cannot be read",
    ),
    "unscaled": ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false, a network"),
    "window": ("mistral", {"sliding_window": 16}, "sliding_window=16, .* within 16 tokens"),
    "window of Qwen": ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true, a net"),
    "layers with a window": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types=.sliding_attention., a network that cannot be read",
    ),
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config=.gptq., .*: give the weights that were not yet quantised",
    ),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "rotary of another kind": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        "rope_type=.longrope., .*: of ways to slow rotary angles down, llama3 and yarn are known",
    ),
    "no size": ("llama", {"hidden_size": "remove"}, "lacks the key 'hidden_size'"),
    "another size": ("llama", {"intermediate_size": 40}, "does not hold the model it describes"),
    "odd heads": ("llama", {"head_dim": 7}, "model.head_dim=7 is odd"),
    "fewer embeddings": ("llama", {"vocab_size": 300}, "tokenizer of 400 tokens and an embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(folders: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    name, values, message = REFUSED[case]
    source = edited(folders(name), tmp_path / "source", **values)
    if case not in ("another size", "fewer embeddings", "no causal model"):
        (source / "model.safetensors").unlink()  # it is not even looked for
    with pytest.raises(CheckpointError, match=message) as hit:
        convert("hf", "native", source, tmp_path / "target")
    assert "\n" not in str(hit.value)
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_damaged_files(folders: Callable[[str], Path], tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert("hf", "native", source, tmp_path / "target")
        assert sorted(os.listdir(tmp_path)) == ["source"]

    source = shutil.copytree(folders("qwen3"), tmp_path / "source")
    tensors = tensors_of(source)
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    refused("holds no checkpoint")
    weights.write_bytes(content[:-100])
    refused("is damaged")
    weights.unlink()
    halves = (dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:]))
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for half, file in zip(halves, names):
        save_file(half, source / file)
    index = {"weight_map": {name: file for half, file in zip(halves, names) for name in half}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint(source)
    (source / names[1]).unlink()
    refused(f"is incomplete: {names[1]} is missing")
    (source / "model.safetensors.index.json").unlink()
    (source / names[0]).unlink()
    of_q = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, of_q: tensors[of_q].to(torch.int8)}, weights)
    refused(f"{of_q} is I8, quantised or sparse")
    save_file({name: tensor for name, tensor in tensors.items() if name != of_q}, weights)
    refused(f"does not hold the model it describes: missing {of_q}")
    save_file({**tensors, "model.layers.0.mlp.extra.weight": tensors[of_q] + 1}, weights)
    refused("does not hold the model it describes: unknown model.layers.0.mlp.extra.weight")


def test_networks_that_transformers_lacks(folders: Callable[[str], Path], tmp_path: Path) -> None:
    config = open_checkpoint(folders("llama")).described.config
    for change, message in {
        "model.norm=layernorm": "model.norm=layernorm cannot be written as a LlamaForCausalLM",
        "model.head_bias=true": "model.head_bias=true cannot be written as a LlamaForCausalLM",
        "training.objective=masked_cross_entropy": "training.objective=masked_cross_entropy can",
        "model.conditioning=adaln": "model.conditioning=adaln cannot be written",
        "model.activation=geglu": "model.activation=geglu cannot be written as a Llama",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            raw_of(config.override(change), block_length=64)


def run_config(source: HuggingFaceSource, *changes: str) -> Config:
    """A run's configuration that begins with a model, as a user would set it."""
    config = source.described.config
    defaults = Config()
    return config.override(
        "model.init_from=there",
        f"training.objective={defaults.training.objective}",
        "model.dropout=0.1",
        *changes,
    )


ADALN = ("model.conditioning=adaln", "model.adaln_gate_init=one", "model.time_conditioning=true")


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_other_runs_begin_with_one(folders: Callable[[str], Path], graph: str) -> None:
    source = open_checkpoint(folders("qwen3"))
    weights = InitialWeights(
        source,
        run_config(
            source,
            *ADALN,
            f"graph.name={graph}",
            "model.parametrisation=mean",
            "model.head_bias=true",
        ),
    )
    shapes = weights._shapes
    has_mask = graph == "absorb"
    assert shapes["embedding.tokens.weight"] == (ROWS + has_mask, 32)
    for name, shape in shapes.items():
        whole, given = weights.read(name)
        assert whole.shape == shape
        if ".modulation." in name or ".sigma." in name:
            assert given is not None and not given.any()
        elif name == "head.linear.bias":
            assert not whole.any() and (given is None or given.all())
        else:
            assert given is None or given.all()
            theirs = source.read(name, "ema")
            assert torch.equal(whole, theirs[: len(whole)])


def test_the_recipe_of_qwen3_begins_with_the_published_model() -> None:
    published = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    found = config_of(Path("c"), published)
    recipe = load_config(ROOT / "configs/runs/adapt_qwen3_0.6b.yaml")
    free = {key: getattr(found.model, key) for key in ("parametrisation", "init_from")}
    assert dataclasses.replace(recipe.model, **free) == found.model
    check_causal_start(recipe, found, "the published model")
    assert recipe.training.shift == found.training.shift


def test_runs_that_do_not_begin_as_the_model_does(folders: Callable[[str], Path]) -> None:
    source = open_checkpoint(folders("qwen3"))
    mean = "model.parametrisation=mean"
    for changes, message in {
        (): "model.parametrisation=score does not fit .*: logits of an autoregressive model have",
        (mean, *ADALN[::2]): "model.adaln_gate_init=zero would not begin as",
        (mean, *ADALN, "model.zero_init=false"): "model.zero_init=false would not begin as",
        (mean, "model.tied_embedding=true"): "model.tied_embedding=true does not fit",
        (mean, "model.qk_norm=false"): "model.qk_norm=false does not fit .* set model.qk_norm=true",
        (mean, "model.head_dim=8"): "model.head_dim=8 does not fit .* which has 16",
        (mean, "model.vocab_size=400"): "or set model.vocab_size=403 where it has a few unused",
    }.items():
        with pytest.raises(ConfigError, match=message):
            InitialWeights(source, run_config(source, *changes))
    InitialWeights(source, run_config(source, mean))
    InitialWeights(source, run_config(source, "training.objective=masked_cross_entropy"))
    same = run_config(source, mean, "model.ffn_hidden_size=null", "model.mlp_ratio=1")
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size=32 does not fit"):
        InitialWeights(source, same)


def test_a_native_copy_is_as_good_a_beginning(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    convert("hf", "native", folders("llama 3"), tmp_path / "native")
    source = open_checkpoint(tmp_path / "native")
    assert isinstance(source, NativeSource)
    weights = InitialWeights(source, run_config(source, "model.parametrisation=mean"))  # type: ignore[arg-type]
    direct = open_checkpoint(folders("llama 3"))
    for name in weights._shapes:
        assert torch.equal(weights.read(name)[0], direct.read(name, "ema"))


@pytest.fixture(scope="module")
def dataset(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    prepare(
        [str(write_jsonl(folder / "texts.jsonl", make_texts(60)))],
        output=folder / "data",
        tokenizer="hf",
        tokenizer_path=folders("qwen3"),
        block_length=32,
    )
    return folder / "data"


def test_a_run_begins_as_the_model_whatever_it_learns(
    folders: Callable[[str], Path], dataset: Path, tmp_path: Path
) -> None:
    """Its first step changes nothing; outputs are the model's, conditioned on sigma or not."""
    source = folders("qwen3")
    (tmp_path / "model.yaml").write_text(open_checkpoint(source).described.config.to_yaml())
    tokens = torch.arange(ROWS)[:, None]  # of one token, causal attention sees as much as any
    model = load_pretrained(source, device="cpu")
    wanted = model.network.hidden(tokens, torch.zeros(ROWS)).detach()
    for name, changes in {"plain": (), "conditioned": ADALN}.items():
        config = load_config(
            tmp_path / "model.yaml",
            [
                *(f"data.path={dataset}", "data.block_length=32", f"model.init_from={source}"),
                *("training.steps=1", "training.valid_every=0", "training.global_batch=8"),
                *("training.precision=fp32", "optimizer.lr=1e-30"),
                *("training.objective=masked_cross_entropy", *changes),
            ],
        )
        train(config, tmp_path / name)
        trained = load_pretrained(tmp_path / name, device="cpu")
        assert trained.graph.num_tokens == ROWS and not trained.causal
        found = trained.network.hidden(tokens, torch.full((ROWS,), 0.7)).detach()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    config = config.override("model.vocab_size=null", "model.init_from=null")
    assert open_dataset(config)[0].model.vocab_size == 400
    with pytest.raises(ConfigError, match=r"model\.vocab_size=403 does not fit"):
        open_dataset(config.override("model.vocab_size=403"))


def test_one_tensor_of_a_file_is_read_at_a_time(folders: Callable[[str], Path]) -> None:
    opened = open_checkpoint(folders("mistral"))
    with safe_open(folders("mistral") / "model.safetensors", "pt") as file:
        assert {row[0] for row in opened.contents()} == set(file.keys())
