"""Models written for transformers: loaded where this package is not, and read back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.convert import convert
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.pretrained import load_pretrained, save_pretrained
from sedd_scale.model.parameters import logical_parameters
from sedd_scale.model.score_model import ScoreModel
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.preparation.sentencepiece_training import train_sentencepiece
from sedd_scale.sampling.samplers import draw
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.opening import open_tokenizer
from tests.data.corpus import make_texts
from tests.repository import DATA

LENGTH, SAMPLES = 12, 2
SIZES = (
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.cond_dim=24"),
    *("model.zero_init=false", f"data.block_length={LENGTH}", "model.dropout=0.0"),
)
QWEN = (
    *("model.norm=rmsnorm", "model.num_kv_heads=2", "model.head_dim=6", "model.qk_norm=true"),
    *("model.activation=swiglu", "model.mlp_bias=false", "model.tied_embedding=true"),
    *("model.head_bias=false", "model.conditioning=none", "model.time_conditioning=false"),
)
YARN = (
    *("model.rotary_scaling=yarn", "model.rotary_factor=4.0", "model.rotary_original_length=8"),
    *("model.rotary_base=100.0", "model.activation=geglu", "model.qkv_bias=true"),
)
LLAMA3 = (
    *("model.rotary_scaling=llama3", "model.rotary_factor=8.0", "model.rotary_original_length=8"),
    *("model.norm=rmsnorm", "model.norm_bias=true", "model.adaln_gate_init=one"),
)
GPT2 = (
    *("model.positions=learned", f"model.max_positions={LENGTH}", "model.norm_bias=true"),
    *("model.qkv_bias=true", "model.attention_out_bias=true", "noise.name=cosine"),
)
MODELS: dict[str, tuple[str, ...]] = {
    "published": (),
    "unscaled": ("model.scale_by_sigma=false", *YARN),
    "mean, shift": ("model.parametrisation=mean", "training.shift=true", *QWEN),
    "masked": ("training.objective=masked_cross_entropy", *LLAMA3),
    "uniform": ("graph.name=uniform", "noise.name=geometric", *GPT2),
    "uniform mean": ("graph.name=uniform", "model.parametrisation=mean", "noise.name=linear"),
}
LABELS = torch.arange(3 * LENGTH).view(3, LENGTH)
# What a process without this package finds: logits, log-scores, greedy samples, loss and gradient.
PROGRAM = f"""
import sys
sys.modules["sedd_scale"] = None  # so that to import it is an error
import torch
from transformers import AutoModelForMaskedLM
found = {{}}
for folder in sys.argv[2:]:
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    given = torch.load(folder + "/given.pt")
    tokens, sigma = given["tokens"], given["sigma"]
    with torch.no_grad():
        one = {{"logits": model(tokens, sigma=sigma).logits}}
    one["scores"] = model.log_score(tokens, sigma)
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate_diffusion(given["prompt"], steps=8, generator=generator)
    one["drawn"] = drawn
    if model.config.graph == "absorb":
        for steps in (None, 4):
            one[str(steps)] = model.generate_diffusion(
                num_samples={SAMPLES}, length={LENGTH}, sampler="confidence", temperature=0,
                steps=steps,
            )
        one["ancestral"] = model.generate_diffusion(
            given["prompt"], sampler="ancestral", steps=8, top_p=0.9, generator=generator
        )
    padded = torch.cat([tokens[:, :5], tokens[:, :2]], 1)
    short = model(tokens[:, :5], sigma=sigma).logits
    seen = torch.arange(7).expand(3, 7) < 5
    one["padding"] = model(padded, sigma=sigma, attention_mask=seen).logits[:, :5] - short
    loss = model(tokens, sigma=sigma, labels=given["labels"]).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    norm, ends = float(sum(g.square().sum() for g in gradients)) ** 0.5, []
    with torch.no_grad():
        for step in (0.01, -0.02):
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter += step / norm * gradient
            ends.append(float(model(tokens, sigma=sigma, labels=given["labels"]).loss))
    one |= {{"loss": loss.detach(), "norm": norm, "slope": (ends[0] - ends[1]) / 0.02}}
    if model.config.trunk["positions"] == "learned":
        try:
            model(tokens.repeat(1, 2), sigma=sigma)
        except ValueError as error:
            one["too long"] = str(error)
    found[folder] = one
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def models() -> dict[str, ScoreModel]:
    layout, tokenizer = initialize_layout(), BytesTokenizer()
    made = {}
    for name, overrides in MODELS.items():
        config = Config().override(*SIZES, *overrides, f"model.vocab_size={tokenizer.vocab_size}")
        config.validate()
        model = ScoreModel(
            config, tokenizer.vocab_size, layout, block_length=LENGTH, tokenizer=tokenizer
        )
        generator = torch.Generator().manual_seed(1)
        for logical in logical_parameters(model.network, layout):
            assert logical.shard is not None
            with torch.no_grad():  # norms and biases begin as ones and zeros
                logical.shard.add_(0.1 * torch.randn(logical.shape, generator=generator))
        made[name] = model
    return made


def noisy(model: ScoreModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens_BL = torch.randint(257, (3, LENGTH), generator=generator)
    if model.graph.mask_id is not None:
        tokens_BL[:, ::2] = model.graph.mask_id
    return tokens_BL, torch.tensor([0.2, 1.0, 4.0])


@pytest.fixture(scope="module")
def folders(
    models: dict[str, ScoreModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The directory of each model, by way of a run."""
    folder, made = tmp_path_factory.mktemp("exported"), {}
    for name, model in models.items():
        save_pretrained(model, folder / f"{name} run", format="native")
        made[name] = folder / name.replace(" ", "-")
        convert("native", "hf", folder / f"{name} run", made[name], shard_bytes=40_000)
        tokens_BL, sigma_B = noisy(model)
        prompt_BL = torch.full((SAMPLES, LENGTH), -1)
        prompt_BL[:, 3:5] = 65
        given = {"tokens": tokens_BL, "sigma": sigma_B, "prompt": prompt_BL, "labels": LABELS}
        torch.save(given, made[name] / "given.pt")
    return made


@pytest.fixture(scope="module")
def elsewhere(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers makes of each in a process that cannot import this package."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "program.py").write_text(PROGRAM)
    subprocess.run(
        [sys.executable, folder / "program.py", folder / "found.pt", *folders.values()],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "cache")},
        check=True,
        timeout=300,
    )
    found = torch.load(folder / "found.pt")
    return {name: found[str(path)] for name, path in folders.items()}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_alone_gives_our_outputs_and_samples(
    models: dict[str, ScoreModel], elsewhere: Any, name: str
) -> None:
    model, found = models[name], elsewhere[name]
    tokens_BL, sigma_B = noisy(model)
    with torch.no_grad():
        every_M = torch.arange(tokens_BL.numel())
        logits_MV = model.logits(tokens_BL, sigma_B, every_M)
        logits_BLV = logits_MV.view(*tokens_BL.shape, -1)
        scores_BLV = model.log_score(tokens_BL, sigma_B)
    for ours, theirs in ((logits_BLV, found["logits"]), (scores_BLV, found["scores"])):
        tokens = model.graph.num_tokens  # the mask's column means nothing
        ours, theirs = ours[..., :tokens], theirs[..., :tokens]
        assert float((ours - theirs).norm() / ours.norm()) < 1e-6
    if model.config.model.positions == "learned":
        assert found["too long"] == f"{2 * LENGTH} tokens, but this network has {LENGTH} positions"
    assert float(found["padding"].abs().max()) < 1e-5
    log_p_BLN = logits_BLV[..., :tokens].log_softmax(-1)
    loss = -log_p_BLN.gather(-1, LABELS[..., None]).mean()
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert found["slope"] == pytest.approx(found["norm"], rel=2e-2)
    for steps in (None, 4) if model.graph.mask_id is not None else ():
        given_BL = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
        settings = SamplerSettings(sampler="confidence", temperature=0, steps=steps)
        drawn_BL = draw(model, given_BL, torch.zeros_like(given_BL, dtype=torch.bool), settings)
        assert torch.equal(drawn_BL, found[str(steps)])
    for drawn in ("drawn", "ancestral"):
        if drawn in found:
            assert int(found[drawn].max()) < model.graph.num_tokens
            assert found[drawn][:, 3:5].eq(65).all() and found[drawn][:, 5:].ne(65).any()


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_read_back(
    models: dict[str, ScoreModel], folders: dict[str, Path], name: str
) -> None:
    source = open_checkpoint(folders[name], format="hf")
    expected = models[name].config
    for key in ("model", "graph", "noise"):
        free = dict.fromkeys(("dropout", "zero_init", "adaln_gate_init"))
        found = source.described.config.to_dict()[key]
        assert {**found, **free} == {**expected.to_dict()[key], **free}
    assert len(list(folders[name].glob("*.safetensors"))) > 1
    again = load_pretrained(folders[name])
    assert isinstance(again.tokenizer, BytesTokenizer)
    tokens_BL, sigma_B = noisy(again)
    ours = models[name].log_score(tokens_BL, sigma_B)
    assert torch.equal(again.log_score(tokens_BL, sigma_B), ours)


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "bytes"])
@pytest.mark.parametrize("target", ["hf", "hf-causal"])
def test_tokenizers_come_back(tmp_path: Path, target: str, kind: str) -> None:
    import transformers

    tokenizer: Tokenizer = BytesTokenizer()
    if kind == "gpt2":
        tokenizer = open_tokenizer(DATA / "tokenizer")
    elif kind == "sentencepiece":
        tokenizer = train_sentencepiece(make_texts(60), 300)
    causal = ("training.objective=autoregressive", "training.shift=true")
    config = Config().override(*SIZES, *QWEN, *(causal if target == "hf-causal" else ()))
    model = ScoreModel(
        config.override(f"model.vocab_size={tokenizer.vocab_size}"),
        tokenizer.vocab_size,
        initialize_layout(),
        block_length=LENGTH,
        tokenizer=tokenizer,
    )
    save_pretrained(model, tmp_path / "run", format="native")
    convert("native", target, tmp_path / "run", tmp_path / "target")
    again = load_pretrained(tmp_path / "target").tokenizer
    assert again is not None and again.fingerprint == tokenizer.fingerprint
    if kind == "gpt2":
        theirs = transformers.AutoTokenizer.from_pretrained(
            tmp_path / "target", trust_remote_code=True
        )
        text = "It was a dark night, and  the 3rd."
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_the_card_says_how_it_is_loaded(folders: dict[str, Path]) -> None:
    text = (folders["published"] / "README.md").read_text()
    assert "library_name: transformers" in text
    assert 'AutoModelForMaskedLM.from_pretrained("published", trust_remote_code=True)' in text


def test_what_it_cannot_be_is_refused(
    models: dict[str, ScoreModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    config = models["published"].config.override("training.objective=autoregressive")
    causal = ScoreModel(config, 257, initialize_layout(), block_length=LENGTH)
    save_pretrained(causal, tmp_path / "causal", format="native")
    with pytest.raises(CheckpointError, match="is no diffusion model: use --to hf-causal"):
        convert("native", "hf", tmp_path / "causal", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    config_file = folders["masked"] / "config.json"
    raw = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**raw, "trunk": {"hidden_size": 3.5}}))
    try:
        with pytest.raises(CheckpointError, match="is not what sedd_scale writes"):
            open_checkpoint(folders["masked"])
    finally:
        config_file.write_text(json.dumps(raw))
