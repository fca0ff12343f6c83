"""Small checkpoints in our own format, with a tokenizer, made without training."""

from pathlib import Path

from sedd_scale.interop.pretrained import save_pretrained
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from sedd_scale.tokenizers.base import Tokenizer
from tests.evaluation.enumeration import tiny_model


def write_checkpoint(
    directory: Path,
    *,
    graph: str = "absorb",
    noise: str = "loglinear",
    tokenizer: Tokenizer | None = None,
    block_length: int = 32,
    seed: int = 0,
) -> Path:
    """A run directory with the checkpoint of a random network over the tokenizer's vocabulary."""
    tokenizer = tokenizer or BytesTokenizer()
    model = tiny_model(
        graph, noise, num_tokens=tokenizer.vocab_size, block_length=block_length, seed=seed
    )
    model.tokenizer = tokenizer
    tokenizer.save(directory.with_name(directory.name + "-tokenizer"))
    save_pretrained(model, directory, format="native")
    return directory
