"""A causal language model in the Hugging Face format, small enough to compute by hand."""

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt

CONTEXT = 8
CHARACTERS = "abcdefgh "


def write_judge(directory: Path) -> Path:
    """A GPT-2 without layers over the characters, random weights: a token sees only itself."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {"?": 0, **{letter: k for k, letter in enumerate(CHARACTERS, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(directory)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=CONTEXT, n_embd=6, n_layer=0, n_head=2
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory)
    return directory


def nats_by_hand(directory: Path, text: str) -> list[float]:
    """Nats of each scored token of a text, in float64 and without the library's model.

    The logits are norm(token embedding + position embedding) times the token embeddings; each
    window of `CONTEXT` tokens begins anew.
    """
    from safetensors.numpy import load_file

    tensors = {
        name.removeprefix("transformer."): tensor.astype(np.float64)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    ids = [1 + CHARACTERS.index(letter) if letter in CHARACTERS else 0 for letter in text]
    nats = []
    for start in range(0, len(ids), CONTEXT):
        window = ids[start : start + CONTEXT]
        for place, (before, token) in enumerate(itertools.pairwise(window)):
            hidden = tensors["wte.weight"][before] + tensors["wpe.weight"][place]
            logits = tensors["wte.weight"] @ _norm(hidden, tensors)
            nats.append(float(np.log(np.exp(logits).sum()) - logits[token]))
    return nats


def _norm(
    hidden_H: npt.NDArray[np.float64], tensors: dict[str, npt.NDArray[np.float64]]
) -> npt.NDArray[np.float64]:
    centred = hidden_H - hidden_H.mean()
    scaled = centred / np.sqrt((centred**2).mean() + 1e-5)
    return scaled * tensors["ln_f.weight"] + tensors["ln_f.bias"]
