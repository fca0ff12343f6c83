"""The flags that name a model: its tokenizer fits, and its precision is the one asked for."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sedd_scale.errors import DataError
from sedd_scale.interop import model_arguments, pretrained
from sedd_scale.interop.convert import convert
from sedd_scale.interop.model_arguments import add_model_arguments, open_model
from sedd_scale.parallel import layout as layouts
from sedd_scale.parallel.layout import initialize_layout
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import DATA


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_a_tokenizer_is_given_to_a_checkpoint_that_carries_none(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native")
    convert("native", "sedd-hf", native, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer").rename(tmp_path / "bytes")
    assert open_model(parsed("--checkpoint", tmp_path / "hf")).tokenizer is None
    model = open_model(
        parsed("--checkpoint", tmp_path / "hf", "--tokenizer-path", tmp_path / "bytes")
    )
    assert model.tokenizer.fingerprint == BytesTokenizer().fingerprint
    Text8Tokenizer().save(tmp_path / "letters")
    with pytest.raises(DataError, match="has 27 tokens and the checkpoint 257"):
        open_model(
            parsed("--checkpoint", tmp_path / "hf", "--tokenizer-path", tmp_path / "letters")
        )
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        open_model(parsed("--checkpoint", tmp_path / "hf", "--tokenizer-path", tmp_path / "none"))


def test_gpt2_files_are_a_tokenizer(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native")
    with pytest.raises(DataError, match="is not the tokenizer of"):
        open_model(parsed("--checkpoint", native, "--tokenizer-path", DATA / "tokenizer"))


def test_precision_is_that_of_the_weights(tmp_path: Path) -> None:
    native = write_checkpoint(tmp_path / "native")
    model = open_model(parsed("--checkpoint", native, "--precision", "bf16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokens_BL = torch.full((1, 4), 257)
    full = open_model(parsed("--checkpoint", native)).log_score(tokens_BL, torch.ones(1))
    torch.testing.assert_close(
        model.log_score(tokens_BL, torch.ones(1)), full, rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cpu", [], "fp32"),
        ("cuda", [], "bf16"),
        ("cuda", ["--precision", "fp32"], "fp32"),
        ("cpu", ["--precision", "bf16"], "bf16"),
    ],
)
def test_a_gpu_samples_in_bf16_unless_told(
    device: str, flags: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = dataclasses.replace(initialize_layout(), device=torch.device(device))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(layouts, "initialize_layout", lambda tensor: layout)
    monkeypatch.setattr(pretrained, "load_pretrained", lambda path, **given: asked.update(given))
    monkeypatch.setattr(model_arguments, "fit_tokenizer", lambda model: None)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, precision="auto")
    arguments = parser.parse_args(["--checkpoint", "RUN", *flags])
    open_model(arguments)
    assert arguments.precision == expected
    assert asked["dtype"] == {"fp32": torch.float32, "bf16": torch.bfloat16}[expected]
