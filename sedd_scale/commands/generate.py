"""Draw samples from a trained model, unconditionally or around given text."""

import argparse
import os
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from sedd_scale.cli import Command, at_least, count, given_path, make_parser, print_result
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.interop.model_arguments import add_model_arguments, open_model
from sedd_scale.sampling import samplers_of
from sedd_scale.sampling.settings import SamplerSettings

if TYPE_CHECKING:
    from sedd_scale.generation.batch import Request
    from sedd_scale.generation.generate import Generated
    from sedd_scale.generation.prompts_file import PromptLine
    from sedd_scale.model.score_model import ScoreModel

DEFAULT_TRACED = 4


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "sedd-scale generate",
        "Draw samples from a trained model, unconditionally or around given text, on any number of "
        "processes. Killed and started again, the same command resumes.",
        "torchrun --nproc-per-node 2 -m sedd_scale generate --checkpoint runs/books "
        "--num-samples 16 --length 128 --steps 64 --sampler analytic --seed 0 "
        "--output samples.jsonl",
    )
    add_model_arguments(parser, precision="auto")
    add = parser.add_argument
    add(
        "--output",
        type=given_path,
        required=True,
        metavar="FILE.jsonl",
        help="one record per sample; until it is complete, FILE.jsonl.parts holds what is done",
    )
    add("--num-samples", type=count, metavar="K", help="samples without --prompts (1)")
    add(
        "--prompts",
        type=given_path,
        metavar="FILE.jsonl",
        help='lines such as {"id": 7, "text": "It was [blank:3] night, ____", "num_samples": 2, '
        '"seed": 1}, or with prefix and/or suffix, or with tokens and positions; sampler options '
        "of a line (steps, temperature, ...) override those of the command",
    )
    add(
        "--on-bad-prompt",
        choices=("stop", "skip"),
        default="stop",
        help="at a line that cannot be used: stop before any work, or report it and skip it "
        "(%(default)s)",
    )
    add("--blank", default="____", metavar="TEXT", help="marks a blank in text (%(default)s)")
    add(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="draw only part I of N (from 0), for jobs that share the samples; each needs its own "
        "--output (slurm/generate.sh joins them)",
    )
    add("--length", type=count, metavar="L", help="tokens in a sample (the checkpoint's block)")
    add("--seed", type=at_least(0), default=0, metavar="I", help="seed of all draws (%(default)s)")
    add("--batch-size", type=count, default=16, metavar="B", help="samples at a time (%(default)s)")
    group = parser.add_argument_group("how samples are drawn")
    for key in fields(SamplerSettings):
        # Without a sampler the model's own is taken.
        default = None if key.name == "sampler" else key.default
        group.add_argument(_flag(key.name), default=default, **key.metadata)
    _add_report_options(parser)
    return parser


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is reported").add_argument
    add(
        "--judge",
        metavar="PATH_OR_NAME",
        help="causal language model that gives the samples a generative perplexity: a Hugging Face "
        "model directory, a .gguf file or a name on the hub (gpt2-large in most papers)",
    )
    add(
        "--trace",
        type=given_path,
        metavar="FILE.html",
        help="record the trajectories of the first samples and write a page of them",
    )
    add(
        "--trace-samples",
        type=count,
        metavar="K",
        help=f"number of samples to trace, with --trace ({DEFAULT_TRACED})",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen."""
    if arguments.prompts is not None and arguments.num_samples is not None:
        raise ConfigError(
            "--num-samples does not go with --prompts: give num_samples in the prompts' lines"
        )
    if arguments.prompts is None and arguments.on_bad_prompt != "stop":
        raise ConfigError("--on-bad-prompt goes with --prompts: give a file or leave it out")
    if arguments.trace_samples is not None and arguments.trace is None:
        raise ConfigError("--trace-samples goes with --trace FILE.html: give it or leave it out")
    if not arguments.blank:
        raise ConfigError("--blank is empty: give a marker such as ____")


def generate_command(arguments: argparse.Namespace) -> None:
    """Draw the samples; the first process writes the report and prints it."""
    from sedd_scale.files.atomic import refuse_existing_output
    from sedd_scale.generation.batch import requests_of_shard
    from sedd_scale.generation.generate import generate
    from sedd_scale.generation.judge import check_judge
    from sedd_scale.generation.prompts_file import read_prompt_lines
    from sedd_scale.generation.samples_file import report_path
    from sedd_scale.generation.trace_page import write_trace_page
    from sedd_scale.interop.fingerprint import checkpoint_digest
    from sedd_scale.parallel.layout import shutdown

    check_arguments(arguments)
    options = {key.name: getattr(arguments, key.name) for key in fields(SamplerSettings)}
    settings = SamplerSettings(**{**options, "sampler": arguments.sampler or "analytic"})
    is_first = os.environ.get("RANK", "0") == "0"
    refuse_existing_output(arguments.output)
    refuse_existing_output(report_path(arguments.output), "the report ")
    if arguments.trace is not None:
        refuse_existing_output(arguments.trace, "--trace ")
        for other in (arguments.output, report_path(arguments.output)):
            if arguments.trace.resolve() == other.resolve():
                raise ConfigError(f"--trace {arguments.trace} is written already: give another")
    skipped: list[DataError] = []
    on_bad = skipped.append if arguments.on_bad_prompt == "skip" else None
    lines = None
    if arguments.prompts is not None:
        lines = read_prompt_lines(arguments.prompts, on_bad=on_bad)
    if arguments.judge is not None and is_first:
        check_judge(arguments.judge)

    model = open_model(arguments)
    if arguments.sampler is None:
        settings = replace(settings, sampler=samplers_of(model.kind)[0])
    settings.check_kind(model.kind)
    requests = _requests(arguments, model, settings, lines, skipped)
    if arguments.shard is not None:
        requests = requests_of_shard(requests, arguments.batch_size, *arguments.shard)
    if is_first:
        for error in skipped:
            print(f"skipped: {error}", file=sys.stderr)
    traced: list[dict[str, Any]] = []

    def keep_traced(record: dict[str, Any]) -> None:
        if "trace" in record:
            traced.append(record)

    made = generate(
        model,
        requests,
        arguments.output,
        batch_size=arguments.batch_size,
        tokenizer=model.tokenizer,
        run={
            "--checkpoint": checkpoint_digest(arguments.checkpoint),
            "--weights": arguments.weights,
            "--precision": arguments.precision,
            "--tokenizer": None if model.tokenizer is None else model.tokenizer.fingerprint,
            "--seed": arguments.seed,
            "--length": arguments.length,
            "--num-samples": arguments.num_samples,
            **{_flag(name): value for name, value in settings.to_dict().items()},
        },
        num_traced=(arguments.trace_samples or DEFAULT_TRACED) if arguments.trace else 0,
        progress=sys.stderr,
        on_record=keep_traced,
    )
    if is_first and arguments.trace is not None and traced:
        write_trace_page(arguments.trace, traced)
    _report(arguments, model, made, len(skipped))
    shutdown()


def _report(
    arguments: argparse.Namespace,
    model: "ScoreModel",
    made: "Generated",
    skipped: int,
) -> None:
    """Judge the samples, on all processes, and write and print the report on the first."""
    from sedd_scale.generation.quality import format_quality
    from sedd_scale.generation.samples_file import judge_file, report_path, write_report

    output, layout, quality = arguments.output, model.layout, made.quality
    report = {"output": str(output), "prompts_skipped": skipped, **(quality or {})}
    path = report_path(output)
    if quality is not None:
        write_report(path, report)  # a judge that fails takes nothing away
    if arguments.judge is not None and made.samples:
        model.to("meta")  # its memory is the judge's now
        report["generative_perplexity"] = judge_file(
            output,
            arguments.judge,
            layout.device,
            rank=layout.rank,
            world_size=layout.world_size,
        )
    if quality is not None:
        rate = f" ({made.tokens / made.seconds:,.0f} tokens/s)" if made.tokens else ""
        before = f", {made.samples_before:,} of them earlier" if made.samples_before else ""
        # A shard behind the last batch is written all the same, so that all can be joined.
        found = format_quality(report) if made.samples else "no batch is left for this shard"
        try:
            write_report(path, report)
        finally:
            print_result(
                f"{made.samples:,} samples{before}; {made.tokens:,} tokens drawn in "
                f"{made.seconds:.1f} s{rate}\n{found}\n{output}"
            )


def _requests(
    arguments: argparse.Namespace,
    model: "ScoreModel",
    settings: "SamplerSettings",
    lines: "list[PromptLine] | None",
    skipped: list[DataError],
) -> "list[Request]":
    """What is to be drawn; lines that cannot be used are added to `skipped`."""
    from sedd_scale.generation.batch import equal_requests, prompt_requests
    from sedd_scale.generation.prompts_file import prompts_of_lines
    from sedd_scale.sampling.infill import unconditional

    length = arguments.length or model.block_length
    if length is None:
        raise ConfigError("the checkpoint does not name its block length: give --length")
    if model.layout.rank == 0 and model.block_length is not None and length > model.block_length:
        print(
            f"note: --length {length} is beyond the {model.block_length} tokens of training",
            file=sys.stderr,
        )
    if lines is None:
        count = 1 if arguments.num_samples is None else arguments.num_samples
        return equal_requests(count, unconditional(length), arguments.seed, settings)
    prompts = prompts_of_lines(
        lines,
        tokenizer=model.tokenizer,
        num_tokens=model.graph.num_tokens,
        length=length,
        kind=model.kind,
        marker=arguments.blank,
        settings=settings,
        on_bad=skipped.append if arguments.on_bad_prompt == "skip" else None,
    )
    return prompt_requests(prompts, arguments.seed)


def _shard(text: str) -> tuple[int, int]:
    part, slash, whole = text.partition("/")
    if not (slash and part.isdecimal() and whole.isdecimal() and int(part) < int(whole)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, as 0/4")
    return int(part), int(whole)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


COMMANDS = {"": Command(build_parser, generate_command)}
