"""Draw samples from a trained model, unconditionally or around given text."""

import argparse
import sys
import time
from pathlib import Path

from sedd_scale.cli import make_parser, run_command
from sedd_scale.errors import ConfigError
from sedd_scale.interop.model_arguments import add_model_arguments, open_model
from sedd_scale.sampling import SAMPLERS


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "Draw samples from a trained model, unconditionally or around given text.",
        "torchrun --nproc-per-node 2 tools/generate.py --checkpoint runs/books --num-samples 16 "
        "--length 128 --steps 64 --sampler analytic --seed 0 --output samples.jsonl",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.jsonl", help="one record a sample")
    add("--num-samples", type=int, metavar="K", help="samples without --prompts (1)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='lines such as {"id": 7, "text": "It was [blank:3] night, ____", "num_samples": 2, '
        '"seed": 1}, or with prefix and/or suffix, or with tokens and positions',
    )
    add("--blank", default="____", metavar="TEXT", help="marks a blank in text (%(default)s)")
    add("--length", type=int, metavar="L", help="tokens in a sample (the checkpoint's block)")
    add("--steps", type=int, default=128, metavar="S", help="sampling steps (%(default)s)")
    add("--sampler", choices=SAMPLERS, default="analytic", help="step law (%(default)s)")
    add("--seed", type=int, default=0, metavar="I", help="of all draws (%(default)s)")
    add("--batch-size", type=int, default=16, metavar="B", help="samples at a time (%(default)s)")
    return parser


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen."""
    if arguments.prompts is not None and arguments.num_samples is not None:
        raise ConfigError(
            "--num-samples does not go with --prompts: give num_samples in the prompts' lines"
        )
    for name in ("num_samples", "length", "steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is too small: give at least 1")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed} is negative: give an integer from 0 on")
    if not arguments.blank:
        raise ConfigError("--blank is empty: give a marker such as ____")


def generate_command(arguments: argparse.Namespace) -> None:
    """Draw the samples; the first process writes them and prints where."""
    from sedd_scale.parallel.layout import shutdown
    from sedd_scale.sampling.batch import (
        generate,
        mean_entropy,
        prompt_requests,
        refuse_existing_output,
        unconditional_requests,
        write_jsonl,
    )
    from sedd_scale.sampling.infill import unconditional
    from sedd_scale.sampling.prompts_file import prompts_of_lines, read_prompt_lines

    check_arguments(arguments)
    refuse_existing_output(arguments.output)
    model = open_model(arguments)
    length = arguments.length or model.block_length
    if length is None:
        raise ConfigError("the checkpoint does not name its block length: give --length")
    is_first = model.layout.rank == 0
    if is_first and model.block_length is not None and length > model.block_length:
        print(
            f"note: --length {length} is beyond the {model.block_length} tokens of training",
            file=sys.stderr,
        )
    if arguments.prompts is None:
        count = 1 if arguments.num_samples is None else arguments.num_samples
        requests = unconditional_requests(count, unconditional(length), arguments.seed)
    else:
        prompts = prompts_of_lines(
            read_prompt_lines(arguments.prompts),
            tokenizer=model.tokenizer,
            num_tokens=model.graph.num_tokens,
            length=length,
            marker=arguments.blank,
        )
        requests = prompt_requests(prompts, arguments.seed)

    def show(done: int, total: int) -> None:
        if is_first and sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rbatch {done} of {total}", end=end, file=sys.stderr, flush=True)

    start = time.perf_counter()
    records = generate(
        model,
        requests,
        steps=arguments.steps,
        sampler=arguments.sampler,
        batch_size=arguments.batch_size,
        tokenizer=model.tokenizer,
        on_batch=show,
    )
    seconds = time.perf_counter() - start
    if is_first:
        write_jsonl(arguments.output, records)
        tokens = sum(record["length"] for record in records)
        print(
            f"{len(records)} samples, {tokens:,} tokens in {seconds:.1f} s "
            f"({tokens / seconds:,.0f} tokens/s), token entropy {mean_entropy(records):.3f} nats"
        )
        print(arguments.output)
    shutdown()


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), generate_command))
