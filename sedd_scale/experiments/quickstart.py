"""From the text every Python carries to a trained, evaluated and sampled model, in minutes."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.data.shards import Dataset
from sedd_scale.errors import ConfigError, SeddScaleError
from sedd_scale.files.package import environment_for
from sedd_scale.preparation.report import unigram_bits_per_character

MARKER = ".made-by-quickstart"
# Everything the commands below leave in the folder; a rerun removes these and nothing else.
OURS = (
    *("data", "run", "bound.json", "samples.jsonl", "prompts.jsonl", "infilling.jsonl"),
    *("samples.report.json", "infilling.report.json"),
    *("samples.jsonl.parts", "infilling.jsonl.parts"),
)
CURVES = "curves.png"

NUM_SAMPLES = 3
PROMPT = (
    "def __init__(self, name, value=None):\n        self.name = name\n        [blank:12]\n\n"
    "    def __repr__(self):\n        return [blank:12]\n"
)


class Stage(NamedTuple):
    """One command of the tour, and what it does in a line."""

    title: str
    command: list[str]


class StageError(SeddScaleError):
    """A command of the tour that failed."""


def stages(folder: Path, *, steps: int) -> list[Stage]:
    """The tour's commands, in order.

    Args:
        folder: where everything goes.
        steps: of the training; the first tenth runs under tensor parallelism, the rest under data
            parallelism.
    """
    here = Path(os.path.relpath(sys.executable))
    python = str(here if ".." not in here.parts else sys.executable)
    torchrun = str(Path(python).with_name("torchrun"))
    on_one = [python, "-m", "sedd_scale"]
    on_two = [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "sedd_scale"]
    data, run = str(folder / "data"), str(folder / "run")
    train = [*on_two, "train", "configs/runs/quickstart.yaml", "--run-dir", run]
    train.append(f"data.path={data}")
    evaluate = [*on_two, "eval_ppl", "--checkpoint", run, "--data", data]
    sample = [*on_one, "generate", "--checkpoint", run, "--steps", "128"]
    prepare = "prepare_data --input builtin:python --tokenizer sentencepiece"
    prepare += " --vocab-size 2048 --tokenizer-sample 2000000 --block-length 128"
    tensor_steps = max(1, steps // 10)
    return [
        Stage(
            "Prepare: train a tokenizer on the documentation and sources of this Python, and "
            "write shards",
            [*on_one, *prepare.split(), "--output", data],
        ),
        Stage(
            "Train: two processes share the tensors of each layer",
            [*train, f"training.steps={tensor_steps}", "parallel.tensor=2"],
        ),
        Stage(
            "Resume: the same run under another layout, two processes with half of each batch",
            [*train, f"training.steps={steps}", "parallel.tensor=1"],
        ),
        Stage(
            "Evaluate: a bound on the likelihood of text the model has not seen",
            [*evaluate, "--draws", "8", "--json"],
        ),
        Stage(
            "Sample: text from nothing",
            [
                *sample,
                *f"--num-samples {NUM_SAMPLES} --length 128 --sampler analytic --seed 0".split(),
                "--output",
                str(folder / "samples.jsonl"),
            ],
        ),
        Stage(
            "Infill: text around text",
            [
                *sample,
                "--prompts",
                str(folder / "prompts.jsonl"),
                "--output",
                str(folder / "infilling.jsonl"),
            ],
        ),
        Stage(
            "Plot",
            [*on_one, "plot_run", run, "--output", str(folder / CURVES)],
        ),
    ]


def start_over(folder: Path) -> None:
    """Make the folder, empty but for the marker that says whose it is.

    Raises:
        ConfigError: it holds something that no quickstart has written; nothing is removed then.
    """
    allowed = {MARKER, CURVES, *OURS}
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"--output {folder} is not a directory of its own: give another name")
    if folder.exists():
        names = {entry.name for entry in folder.iterdir()}
        foreign = sorted(names - allowed) if MARKER in names else sorted(names)
        if foreign:
            raise ConfigError(
                f"--output {folder} holds {foreign[0]}, which no quickstart has written there: "
                "move it away or give another folder"
            )
        for name in names - {MARKER}:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("sedd-scale quickstart removes this folder's files when rerun\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"text": PROMPT}) + "\n")


def run_stage(stage: Stage, *, capture: bool) -> tuple[str, float]:
    """Run one command; its standard output, if captured, and the seconds it took.

    Raises:
        StageError: it failed.
    """
    print(f"\n# {stage.title}\n$ {shlex.join(stage.command)}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        stage.command,
        env=environment_for({**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE if capture else None,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise StageError(
            f"{stage.title.partition(':')[0].lower()} failed with exit code {done.returncode}: "
            f"see above, and repeat it with: {shlex.join(stage.command)}"
        )
    output = done.stdout if capture else ""
    if output:
        print(output, end="", flush=True)
    return output, seconds


def show_texts(path: Path) -> None:
    """Print the texts of a generated file."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        print(f"--- {path.stem} {record['id']}")
        print(record["text"])
    print("---", flush=True)


def summary(
    bound: dict[str, Any], split: dict[str, Any], unigram_bits: float, seconds: dict[str, float]
) -> list[str]:
    """The last lines: the bound beside the unigram entropy of the same text, and the times.

    Args:
        bound: what sedd-scale eval_ppl prints.
        split: the validation split's entry in the dataset's index.
        unigram_bits: its unigram entropy in bits per character.
        seconds: of each command.
    """
    unigram = split["unigram_entropy_nats"]
    rows = [
        ("", "nats/token", "", "bits/character", "perplexity"),
        (
            "unigram entropy",
            f"{unigram:.4f}",
            "",
            f"{unigram_bits:.4f}",
            f"{math.exp(unigram):.1f}",
        ),
        (
            "bound of the model",
            f"{bound['nats_per_token']:.4f}",
            f" ± {bound['stderr']:.4f}",
            f"{bound['bits_per_char']:.4f}",
            f"{bound['perplexity']:.1f}",
        ),
    ]
    lines = [f"{a:18}{b:>12}{c:9}{d:>16}{e:>12}" for a, b, c, d, e in rows]
    lines += ["", *(f"{name:18}{value:>10.1f} s" for name, value in seconds.items())]
    return [*lines, f"{'all':18}{sum(seconds.values()):>10.1f} s"]


def take_tour(folder: Path, *, steps: int) -> None:
    """Run the tour in `folder` and sum it up.

    Raises:
        ConfigError: the folder holds what no quickstart has written.
        StageError: a command failed, or the model has learned nothing.
    """
    start_over(folder)
    print("$ export OMP_NUM_THREADS=1")
    seconds = {}
    outputs = {}
    for stage in stages(folder, steps=steps):
        name = stage.title.partition(":")[0].lower()
        outputs[name], seconds[name] = run_stage(stage, capture=name == "evaluate")
        if name == "sample":
            show_texts(folder / "samples.jsonl")
        elif name == "infill":
            print(f"--- given\n{PROMPT}", end="")
            show_texts(folder / "infilling.jsonl")

    bound_line = outputs["evaluate"].splitlines()[-1]
    (folder / "bound.json").write_text(bound_line + "\n")
    bound, split = json.loads(bound_line), Dataset(folder / "data").splits["valid"]
    print()
    for line in summary(bound, split, unigram_bits_per_character(split), seconds):
        print(line)
    print(
        f"\nin {folder}: data/ (shards, tokenizer), run/ (configuration, metrics, checkpoints), "
        f"bound.json, samples.jsonl, infilling.jsonl, {CURVES}"
    )
    if not bound["nats_per_token"] < split["unigram_entropy_nats"]:
        raise StageError(
            "the bound is not below the unigram entropy: the model has learned nothing yet; "
            f"train longer, with --training-steps {2 * steps}"
        )
