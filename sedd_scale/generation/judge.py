"""Generative perplexity: how likely a causal language model finds the samples' text.

The judge reads the text with its own tokenizer. Of each window of its context the first token has
nothing before it and is not scored. Two figures are in use under one name, so both are given:

    mean_of_samples  the mean over samples of exp(nats per token of the sample)
    of_corpus        exp of the mean nats over all tokens of all samples

Both fall when text repeats itself or is drawn at a low temperature: read them beside the token
entropy. Published figures mostly have gpt2-large as the judge (arXiv 2310.16834, section 5.2).
"""

import contextlib
import importlib.util
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sedd_scale.errors import ConfigError, DataError

LITERATURE_JUDGE = "gpt2-large"
_TOKENS_AT_A_TIME = 2048
_DEFAULT_CONTEXT = 1024
_GGUF_MAGIC = b"GGUF"


class Score(NamedTuple):
    """What a judge says of one text.

    Attributes:
        nats: summed over the scored tokens.
        tokens: how many are scored; 0 for a text of fewer than two.
    """

    nats: float
    tokens: int


def check_judge(name: str) -> None:
    """Refuse, before any work, a judge that cannot be read; its weights are not loaded.

    Args:
        name: a model directory, a .gguf file, or a name on the Hugging Face hub.

    Raises:
        ConfigError: a package it needs is not installed.
        DataError: nothing readable there.
    """
    _require("transformers")
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise DataError(f"--judge {name} does not exist: give the path of a GGUF file")
        with path.open("rb") as stream:
            if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
                raise DataError(f"--judge {name} is not a GGUF file: give another")
        _require("gguf")
        _require("accelerate")
        return
    if path.is_dir():
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise DataError(f"--judge {name} holds no weights (*.safetensors or *.bin)")
    elif path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise DataError(
            f"--judge {name} does not exist: give a model directory, a .gguf file or a name on the "
            "Hugging Face hub"
        )
    _quiet()
    from transformers import AutoConfig, AutoTokenizer

    with _reading(name):
        AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)


class Judge:
    """A causal language model that scores texts.

    Args:
        name: as in `check_judge`.
        device: where it runs.

    Raises:
        ConfigError: a package it needs is not installed.
        DataError: nothing readable there.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        _require("transformers")
        _quiet()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(name)
        where: dict[str, Any] = {"pretrained_model_name_or_path": name}
        if name.endswith(".gguf"):
            where = {
                "pretrained_model_name_or_path": str(path.parent),
                "gguf_file": path.name,
            }
        with _reading(name):
            self._tokenizer = AutoTokenizer.from_pretrained(**where)
            model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        self._model = model.to(device).eval()
        self._device = device
        self.context = int(getattr(model.config, "max_position_embeddings", _DEFAULT_CONTEXT))

    def scores(self, texts: Sequence[str]) -> list[Score]:
        """The score of each text; a text's does not depend on the others beyond rounding."""
        windows = []
        for number, text in enumerate(texts):
            ids = self._tokenizer(text)["input_ids"]
            for start in range(0, len(ids), self.context):
                window = ids[start : start + self.context]
                if len(window) > 1:
                    windows.append((number, window))
        nats, tokens = [0.0] * len(texts), [0] * len(texts)
        # Of like lengths together, so that little is padding.
        windows.sort(key=lambda window: len(window[1]))
        for batch in _batches(windows):
            scored = self._window_nats([window for _, window in batch])
            for (number, window), window_nats in zip(batch, scored):
                nats[number] += window_nats
                tokens[number] += len(window) - 1
        return [Score(*score) for score in zip(nats, tokens)]

    @torch.no_grad()
    def _window_nats(self, windows: Sequence[Sequence[int]]) -> list[float]:
        longest = max(map(len, windows))
        ids_BL = torch.zeros(len(windows), longest, dtype=torch.int64)
        mask_BL = torch.zeros_like(ids_BL)
        for row, window in enumerate(windows):
            ids_BL[row, : len(window)] = torch.tensor(window)
            mask_BL[row, : len(window)] = 1
        ids_BL = ids_BL.to(self._device)
        logits_BLV = self._model(
            input_ids=ids_BL, attention_mask=mask_BL.to(self._device), use_cache=False
        ).logits
        return [
            float(
                F.cross_entropy(
                    logits_BLV[row, : len(window) - 1].float(),
                    ids_BL[row, 1 : len(window)],
                    reduction="none",
                )
                .double()
                .sum()
            )
            for row, window in enumerate(windows)
        ]


def perplexities(scores: Sequence[Score]) -> dict[str, Any]:
    """Both generative perplexities of scored samples, and what they are over.

    mean_of_samples, of_corpus, nats_per_token (of the corpus), samples_scored, samples_unscored
    (fewer than two tokens), tokens_scored. None where no sample is scored.
    """
    scored = [score for score in scores if score.tokens]
    tokens = sum(score.tokens for score in scored)
    per_sample = [_exp(score.nats / score.tokens) for score in scored]
    nats = math.fsum(score.nats for score in scored) / tokens if scored else None
    return {
        "mean_of_samples": math.fsum(per_sample) / len(scored) if scored else None,
        "of_corpus": None if nats is None else _exp(nats),
        "nats_per_token": nats,
        "samples_scored": len(scored),
        "samples_unscored": len(scores) - len(scored),
        "tokens_scored": tokens,
    }


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _batches(windows: Sequence[tuple[int, Sequence[int]]]) -> list[list[tuple[int, Sequence[int]]]]:
    batches: list[list[tuple[int, Sequence[int]]]] = []
    for window in windows:
        if batches and len(window[1]) * (len(batches[-1]) + 1) <= _TOKENS_AT_A_TIME:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"--judge needs {package}, which is not installed: pip install 'sedd_scale[judge]'"
        )


def _quiet() -> None:
    """The judge's library logs advice on loading; errors still come as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns what the library raises for a model it cannot read into a DataError.

    A GGUF file is read under a progress bar that nothing turns off; it is not shown.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"--judge {name} cannot be read ({reason}): give a model directory, a .gguf file or a "
            f"name on the Hugging Face hub such as {LITERATURE_JUDGE}"
        ) from error
