"""The flags by which commands name a trained model, and the model they name."""

import argparse
from typing import TYPE_CHECKING

from sedd_scale.checkpoint.directory import warn_once
from sedd_scale.cli import count, given_path
from sedd_scale.errors import DataError
from sedd_scale.interop.adapted_tokenizer import adapted
from sedd_scale.interop.assumptions import add_assumptions, assumptions_of

if TYPE_CHECKING:
    from sedd_scale.model.score_model import ScoreModel


def add_model_arguments(
    parser: argparse.ArgumentParser, *, precision: str = "fp32", leave_out: tuple[str, ...] = ()
) -> None:
    """Add --checkpoint, --weights, --tokenizer-path, --tensor, --precision and `Assumptions`.

    Args:
        precision: where none is given; "auto": bf16 on a GPU, fp32 on a CPU.
        leave_out: of the latter, names that the command has its own flag of.
    """
    parser.add_argument(
        "--checkpoint",
        type=given_path,
        required=True,
        metavar="PATH",
        help="a run directory or one of its checkpoints/step-N; a directory in the published "
        "format or of transformers (config.json with its weights); a checkpoint.pth of SEDD's "
        "training code; or weights of MDLM, Duo and others: a .ckpt, .pth or .safetensors file or "
        "their directory",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "master"),
        default="ema",
        help="of a run's checkpoint, the averaged weights or the last ones (%(default)s)",
    )
    parser.add_argument(
        "--tokenizer-path",
        dest="tokenizer",
        type=given_path,
        metavar="PATH",
        help="for a checkpoint that carries none: a prepared dataset's tokenizer directory, a "
        "directory with a Hugging Face tokenizer.json, one with vocab.json and merges.txt, or a "
        "sentencepiece .model file",
    )
    parser.add_argument(
        "--tensor",
        type=count,
        default=1,
        metavar="N",
        help="processes that share one model; the others work on other samples (%(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(dict.fromkeys((precision, "fp32", "bf16"))),
        default=precision,
        help="number format of the network; statistics stay fp32 or finer (%(default)s"
        f"{': bf16 on a GPU' * (precision == 'auto')})",
    )
    add_assumptions(parser, leave_out=leave_out)


def open_model(
    arguments: argparse.Namespace, *, device: str | None = None, spelling: str | None = None
) -> "ScoreModel":
    """The model that the flags name, in the layout they ask for, with its tokenizer if any.

    `arguments.precision` becomes the one that was taken.

    Args:
        device: as of `load_pretrained`.
        spelling: as of `Assumptions`.

    Raises:
        ConfigError, CheckpointError, DataError: of the processes, the checkpoint, the tokenizer.
    """
    import torch

    from sedd_scale.interop.pretrained import load_pretrained
    from sedd_scale.parallel.layout import initialize_layout
    from sedd_scale.tokenizers.opening import open_tokenizer

    tokenizer = None if arguments.tokenizer is None else open_tokenizer(arguments.tokenizer)
    layout = initialize_layout(tensor=arguments.tensor)
    if arguments.precision == "auto":
        arguments.precision = "bf16" if layout.device.type == "cuda" else "fp32"
    model = load_pretrained(
        arguments.checkpoint,
        weights=arguments.weights,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision],
        layout=layout,
        device=device,
        assumptions=assumptions_of(arguments, spelling=spelling),
    )
    if tokenizer is not None:
        own = model.tokenizer
        if own is not None and own.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{arguments.tokenizer} ({tokenizer.kind}, {tokenizer.fingerprint[:12]}) is not "
                f"the tokenizer of {arguments.checkpoint} ({own.kind}, {own.fingerprint[:12]}): "
                "leave it out"
            )
        model.tokenizer = tokenizer
    fit_tokenizer(model)
    return model


def fit_tokenizer(model: "ScoreModel") -> None:
    """Adapt the model's tokenizer to its vocabulary, and say so where it has fewer tokens.

    Raises:
        DataError: it has another vocabulary.
    """
    if model.tokenizer is None:
        return
    before, num_tokens = model.tokenizer.vocab_size, model.graph.num_tokens
    model.tokenizer = adapted(model.tokenizer, num_tokens)
    if before < num_tokens:
        warn_once(
            f"note: the {model.tokenizer.kind} tokenizer has {before} tokens and the checkpoint "
            f"{num_tokens}: ids from {before} on, such as a [PAD], stand for no text"
        )
