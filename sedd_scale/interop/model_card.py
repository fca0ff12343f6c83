"""The README.md of an exported model: what it is, how it was made, what was measured, how to load.

Everything in it comes from the checkpoint and from files of its run: config.yaml's resolved keys,
the last validation of metrics.jsonl at or before the checkpoint's step, and reports of
sedd-scale eval_ppl that name the checkpoint's fingerprint.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_scale.config import Config
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.errors import CheckpointError
from sedd_scale.files.json_lines import read_json_lines
from sedd_scale.interop.checkpoint_source import Description, model_shapes
from sedd_scale.tokenizers.opening import open_tokenizer
from sedd_scale.version import __version__

CARD_FILE = "README.md"
# The authors' program has these schedules.
REFERENCE_NOISE = ("loglinear", "geometric")
_NEEDED = ("nats_per_token", "stderr", "perplexity", "kind", "protocol", "blocks", "data")


@dataclass(frozen=True)
class Measured:
    """One number of the card: nats per token, with its standard error (None: not known)."""

    text: str
    kind: str
    nats_per_token: float
    stderr: float | None

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


def last_validation(run_dir: Path, step: int) -> Measured | None:
    """The last validation of a run at or before `step`, or None."""
    found: Measured | None = None
    for record in read_json_lines(run_dir / "metrics.jsonl"):
        nats = record.get("valid_nats_per_token")
        if nats is not None and record["step"] <= step:
            what = f"validation split, in training at step {record['step']}"
            found = Measured(what, "bound", nats, record.get("valid_stderr"))
    return found


def read_report(path: Path, *, fingerprint: str, weights: str) -> Measured:
    """What sedd-scale eval_ppl printed, of which the last line is its JSON.

    Args:
        fingerprint: of the checkpoint that is exported.
        weights: which of its weights are.

    Raises:
        CheckpointError: no such file, no report, or one of another checkpoint or other weights.
    """
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8").strip().split("\n")[-1])
    except OSError as error:
        raise CheckpointError(f"cannot read --results {path}: {error}") from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or any(key not in report for key in _NEEDED):
        raise CheckpointError(
            f"--results {path} is not a report: give what `sedd-scale eval_ppl` printed, whose "
            "last line is JSON"
        )
    if report.get("checkpoint_fingerprint") != fingerprint or report.get("weights") != weights:
        raise CheckpointError(
            f"--results {path} is about other weights ({report.get('checkpoint')}, "
            f"{report.get('weights')}) than the ones exported: evaluate this checkpoint"
        )
    name = report.get("dataset") or Path(str(report["data"])).name
    how = "exact" if report["kind"] == "exact" else f"protocol {report['protocol']}"
    return Measured(
        f"{name}: {report['blocks']:,} blocks, {how}",
        str(report["kind"]),
        report["nats_per_token"],
        report["stderr"],
    )


def model_card(
    name: str,
    described: Description,
    measured: Sequence[Measured],
    *,
    for_transformers: bool = False,
) -> str:
    """The card's text: YAML front matter, then Markdown.

    Args:
        for_transformers: whether the program of the network lies with it.
    """
    config = described.config
    parts = [
        _front_matter(name, config, measured, for_transformers),
        f"# {name}\n\nA Score Entropy Discrete Diffusion language model "
        "([SEDD, arXiv 2310.16834](https://arxiv.org/abs/2310.16834)), written by sedd_scale "
        f"{__version__}.",
        "## Model\n\n" + _table(_model_rows(described)),
        "## Data and recipe\n\n" + _recipe(described),
        "## Measured\n\n" + _measured(measured),
        "## Loading\n\n" + _loading(name, described, for_transformers),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(
    name: str, config: Config, measured: Sequence[Measured], for_transformers: bool
) -> str:
    # A JSON string is a YAML string.
    library = "transformers" if for_transformers else "sedd_scale"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    lines += [
        f"- {tag}" for tag in ("sedd", "discrete-diffusion", "score-entropy", config.graph.name)
    ]
    if measured:
        lines += ["model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for item in measured:
        bounded = "perplexity" if item.kind == "exact" else "perplexity, upper bound"
        lines += [
            "  - task:",
            "      type: text-generation",
            "    dataset:",
            "      type: text",
            f"      name: {json.dumps(item.text)}",
            "    metrics:",
            "    - type: perplexity",
            f"      name: {json.dumps(bounded)}",
            f"      value: {item.perplexity!r}",
        ]
    return "\n".join([*lines, "---"])


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def _model_rows(described: Description) -> dict[str, object]:
    config = described.config
    parameters = sum(math.prod(shape) for shape in model_shapes(config).values())
    model = config.model
    return {
        "parameters": f"{parameters:,}",
        "layers x width, heads": f"{model.num_layers} x {model.hidden_size}, {model.num_heads}",
        "vocabulary": f"{described.num_tokens:,} tokens"
        + (" and the mask" if config.graph.facts.has_mask else ""),
        "block": f"{described.block_length:,} tokens",
        "graph": config.graph.name,
        "noise": f"{config.noise.name}, {described.noise_range}",
        "weights": "float32",
    }


def _recipe(described: Description) -> str:
    """How the model was trained, or that this is unknown."""
    config = described.config
    if not described.step:
        return "The checkpoint that this was made from does not say how it was trained."
    optimizer, training = config.optimizer, config.training
    sources = [config.data.path] if config.data.path else []
    sources += [str(part.get("path")) for part in config.data.mixture or ()]
    names = ", ".join(Path(source.rstrip("/")).name for source in sources)
    rows: dict[str, object] = {
        "data": names or "not named",
        "tokens trained on": f"{described.tokens:,}",
        "steps": f"{described.step:,} of {training.steps:,}",
        "batch": f"{training.global_batch:,} blocks",
        "optimizer": f"AdamW, lr {optimizer.lr:g}, warm-up {optimizer.warmup_steps:,} steps, "
        f"betas {optimizer.beta1:g} and {optimizer.beta2:g}, weight decay "
        f"{optimizer.weight_decay:g}, clipped at {optimizer.clip:g}",
        "average of the weights": f"decay {optimizer.ema_decay:g}",
        "dropout": f"{config.model.dropout:g}",
        "precision, seed": f"{training.precision}, {training.seed}",
    }
    keys = "\n".join(
        f"{section}.{key}={scalar_text(value)}"
        for section in ("model", "graph", "noise", "optimizer", "training")
        for key, value in config.to_dict()[section].items()
        if not isinstance(value, list | str) or not str(value).startswith("/")
    )
    folded = f"<details><summary>all keys</summary>\n\n```text\n{keys}\n```\n\n</details>"
    return f"{_table(rows)}\n\n{folded}"


def _measured(measured: Sequence[Measured]) -> str:
    if not measured:
        return "Nothing was measured."
    rows = ["| text | | nats/token | perplexity |", "|---|---|---|---|"]
    for item in measured:
        error = "" if item.stderr is None else f" ± {item.stderr:.4f}"
        rows.append(
            f"| {item.text} | {item.kind} | {item.nats_per_token:.4f}{error} | "
            f"{item.perplexity:.3f} |"
        )
    return "\n".join(rows) + (
        "\n\n± is one standard error. A bound is from above: the likelihood is no worse."
    )


def _loading(name: str, described: Description, for_transformers: bool) -> str:
    config, directory = described.config, described.tokenizer_directory
    tokenizer = None if directory is None else open_tokenizer(directory)
    text = (
        "With sedd_scale:\n\n```python\nimport sedd_scale\n\n"
        f'model = sedd_scale.load_pretrained("{name}")\n'
        f"print(sedd_scale.sample(model, 1, steps=128)[0].{'text' if tokenizer else 'tokens'})\n"
        "```\n\n"
    )
    if for_transformers:
        text += (
            "With transformers alone, by the program that lies here:\n\n```python\n"
            "from transformers import AutoModelForMaskedLM\n\n"
            f'model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)\n'
            "tokens = model.generate_diffusion(num_samples=1, steps=128)\n```"
        )
    elif config.noise.name in REFERENCE_NOISE:
        text += (
            "With the authors' program, in a checkout of it:\n\n```python\n"
            "from load_model import load_model\n\n"
            f'model, graph, noise = load_model("{name}", "cuda")\n```'
        )
    else:
        text += f"The authors' program has no schedule {config.noise.name}, so it cannot read this."
    if tokenizer is None:
        return text + "\n\nNo tokenizer lies with the weights."
    if for_transformers and tokenizer.files():
        return f"{text}\n\nThe tokenizer's files ({tokenizer.kind}) lie beside the weights."
    return f"{text}\n\nThe tokenizer ({tokenizer.kind}) is in `tokenizer/`. {tokenizer.about}"
