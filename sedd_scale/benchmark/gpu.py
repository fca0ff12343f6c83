"""All that a GPU is to show, in the minutes there are: most valuable first, each kept as it comes.

Every part runs in a process of its own, so that one that fails takes no other along. Results go to
DIR/results.jsonl as they come, and at the end to DIR/report.md in rows for benchmarks/RESULTS.md.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.cli import add_command, given_path, positive
from sedd_scale.errors import ConfigError
from sedd_scale.files.package import command, environment_for

RESULTS, REPORT = "results.jsonl", "report.md"
# Of --rehearse: sizes that a CPU runs in seconds.
TINY = ("--model", "tiny", "--block-length", "32", "--vocab-size", "64", "--batch-size", "1")
XL = ("model.residual_dtype=bf16",)


class Part(NamedTuple):
    """One measurement.

    Attributes:
        minutes: that it may take.
        words: its command.
        variables: of its environment, beside this process's.
    """

    name: str
    minutes: float
    words: list[str]
    variables: dict[str, str] = {}  # noqa: RUF012


def add_arguments(subparsers: Any) -> None:
    """Register `gpu` and its options."""
    parser = add_command(
        subparsers,
        "gpu",
        help="everything that a GPU is to show, in the minutes there are",
        description="Check kernels, losses and waits on this machine's first GPU, then measure the "
        "loss, the step of\nevery model, memory, samplers and a profile; most valuable first.",
        example="sedd-scale benchmark gpu --minutes 15 --output gpu",
    )
    add = parser.add_argument
    add("--minutes", type=positive, required=True, metavar="M", help="to spend in all")
    add("--output", type=given_path, required=True, metavar="DIR", help="a folder to make")
    add("--rehearse", action="store_true", help="tiny sizes, without a GPU, to try the command")
    parser.set_defaults(run=run)


def parts(*, rehearse: bool) -> Iterator[Part]:
    """The measurements in the order of their worth."""
    checks = [sys.executable, "-m", "sedd_scale.benchmark.gpu_checks"]
    benchmark = command("benchmark")
    quick = ["--quick"] if rehearse else []
    yield Part("doctor", 2, [*command("doctor"), "--json", *quick])
    yield Part("kernels against PyTorch", 1, [*checks, "kernels"])
    yield Part("fp32 losses against a CPU's", 2, [*checks, "losses"])
    yield Part("bf16 losses against fp32", 2, [*checks, "losses", "--precision", "bf16"])
    yield Part("a step without a wait", 1, [*checks, "waits"])
    loss = [*benchmark, "loss", "--json", "--precision", "bf16"]
    if rehearse:
        loss += ["--block-length", "32", "--vocab-size", "64", "--width", "16", "--repeats", "1"]
    else:
        loss += ["--batch-size", "32"]
    yield Part("loss", 1, loss)
    yield Part("loss without kernels", 1, loss, {"SEDD_COMPILE": "0"})
    yield Part("loss beside whole log-scores", 1, [*loss, "--baseline"])
    for model, batch, changes in (
        ("small", 32, ()),
        ("xl", 16, XL),
        ("medium", 32, ()),
        ("large", 16, ()),
        ("small", 64, ("model.residual_dtype=bf16",)),
        ("qwen3_small", 32, ()),
        ("small", 32, ("optimizer.name=muon",)),
    ):
        step = [*benchmark, "step", "--json", "--precision", "bf16", "--repeats", "5"]
        sizes = list(TINY) if rehearse else ["--model", model, "--batch-size", str(batch)]
        dropped = [*changes, "model.dropout=0.1"]
        name = ", ".join([f"step of {model}", f"{batch} sequences", *changes])
        yield Part(name, 1.8, [*step, *sizes, *dropped])
    for model, batch, changes in (("small", 32, ()), ("xl", 16, XL)):
        rates = [*benchmark, "rates", "--json"]
        sizes = list(TINY) if rehearse else ["--model", model, "--batch-size", str(batch)]
        yield Part(
            f"rates and the model of a step of {model}",
            1.5,
            [*rates, *sizes, *changes, "model.dropout=0.1"],
        )
    sample = [*benchmark, "sample", "--json", "--timed-steps", "4", "--precision", "bf16"]
    few = ["--model", "tiny", "--length", "16", "--vocab-size", "64", "--steps", "4"]
    yield Part("samplers", 2, [*sample, *(few if rehearse else ["--batch-size", "64"])])
    profile = [*benchmark, "step", "--json", "--profile", "--precision", "bf16", "--repeats", "1"]
    sizes = list(TINY) if rehearse else ["--model", "small", "--batch-size", "32"]
    yield Part("profile of small", 1, [*profile, *sizes, "model.dropout=0.1"])


def run(arguments: argparse.Namespace) -> None:
    """Run what fits and report it."""
    import torch

    output: Path = arguments.output
    if output.exists():
        raise ConfigError(f"--output {output} exists already: give another folder")
    if not (arguments.rehearse or torch.cuda.is_available()):
        raise ConfigError("no GPU that torch can use: see `sedd-scale doctor`, or add --rehearse")
    output.mkdir(parents=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    found = []
    for part in parts(rehearse=arguments.rehearse):
        left = deadline - time.monotonic()
        if left < 15:
            result: dict[str, Any] = {"part": part.name, "left_out": "no time was left"}
        else:
            print(f"{part.name} ({left / 60:.1f} minutes left)", file=sys.stderr, flush=True)
            result = measured(part, output, seconds=min(60 * part.minutes, left))
        found.append(result)
        with (output / RESULTS).open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        (output / REPORT).write_text(report(found))
    print((output / REPORT).read_text(), end="")
    failed = [result["part"] for result in found if "error" in result]
    if failed:
        raise ConfigError(f"{len(failed)} parts failed ({', '.join(failed)}): see {output}/*.log")


def measured(part: Part, output: Path, *, seconds: float) -> dict[str, Any]:
    """The JSON object that a part ends with, or why there is none; its output goes to a log."""
    import os

    log = output / f"{part.name.replace(' ', '_')}.log"
    begun = time.monotonic()
    result: dict[str, Any] = {"part": part.name, "command": " ".join(part.words[1:])}
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                part.words,
                env=environment_for({**os.environ, **part.variables}),
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {**result, "error": f"not done after {seconds:.0f} s"}
        stream.write(done.stdout)
    result["seconds"] = round(time.monotonic() - begun, 1)
    lines = done.stdout.strip().splitlines()
    try:
        result["found"] = json.loads(lines[-1])
    except (IndexError, ValueError):
        complaints = log.read_text().strip().splitlines()
        return {**result, "error": complaints[-1] if complaints else f"exit code {done.returncode}"}
    return result


def report(found: list[dict[str, Any]]) -> str:
    """Rows of a table: what was found, and the command."""
    lines = ["| what | found | command |", "|---|---|---|"]
    for result in found:
        numbers = result.get("found")
        if numbers is None:
            text = result.get("error") or result["left_out"]
        else:
            text = ", ".join(f"{key} {value:.4g}" for key, value in _numbers(numbers))
        lines.append(f"| {result['part']} | {text} | `{result.get('command', '')}` |")
    return "\n".join(lines) + "\n"


_SHOWN = (
    *("speedup", "tokens_per_second", "seconds", "mfu", "mfu_of_measured_matmul", "peak_mb"),
    *("planned_mb", "predicted_seconds", "time_of_model"),
    *("largest_difference", "loss", "calls_ratio"),
)


def _numbers(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    named = [key for key in _SHOWN if isinstance(found.get(key), float)]
    for key in named or [key for key, value in found.items() if isinstance(value, float)]:
        yield key, found[key]
