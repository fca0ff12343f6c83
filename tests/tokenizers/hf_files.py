"""Small tokenizers of the `tokenizers` library, as language models are published with."""

import json
from pathlib import Path
from typing import Any

from tests.data.corpus import make_texts

EOS = "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}\r\n"


def byte_level(*, size: int = 400, normalizer: bool = False) -> Any:
    """As GPT-2, Llama 3 and Qwen have it; special and other tokens are added behind."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    made = Tokenizer(models.BPE())
    if normalizer:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(make_texts(60), trainer)
    made.add_special_tokens([EOS, "<|start|>"])
    made.add_tokens([AddedToken("<tool>", normalized=not normalizer)])
    _add_beginning(made)
    return made


def unigram(*, byte_fallback: bool = False) -> Any:
    """As T5 has it; special tokens are pieces of the model, and a space begins a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", EOS, "<unk>", "<|start|>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(make_texts(60), trainer)
    if byte_fallback:
        described = json.loads(made.to_str())
        described["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        described["model"]["byte_fallback"] = True
        described["decoder"] = _LLAMA_DECODER
        made = Tokenizer.from_str(json.dumps(described))
    _add_beginning(made)
    return made


_LLAMA_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def llama2() -> Any:
    """As Llama 2 and Mistral have it: pairs merged, a space put before, bytes to fall back on."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<|start|>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, max_token_length=8, show_progress=False
    )
    made.train_from_iterator((word for text in make_texts(20) for word in text.split()), trainer)
    described = json.loads(made.to_str())
    described["decoder"] = _LLAMA_DECODER
    described["added_tokens"] = described["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(described))
    _add_beginning(made)
    return made


def _add_beginning(made: Any) -> None:
    """What adds a special token to every text, cuts it off and pads it."""
    from tokenizers import processors

    begin = ("<|start|>", made.token_to_id("<|start|>"))
    made.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[begin]
    )
    made.enable_truncation(16)
    made.enable_padding(length=16)


MAKERS = {
    "byte level": byte_level,
    "byte level, normalised": lambda: byte_level(normalizer=True),
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "llama 2": llama2,
}


def write_files(directory: Path, made: Any, **config: Any) -> Path:
    """The folder of such a tokenizer; `config` is of tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    config = {"eos_token": EOS, "model_max_length": 16, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (directory / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    return directory
