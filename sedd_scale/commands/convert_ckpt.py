"""Convert a checkpoint between formats, look into one, or compare two."""

import argparse
import math
from typing import Any

from sedd_scale.cli import Command, given_path, make_parser
from sedd_scale.errors import ConfigError
from sedd_scale.interop import FORMATS, TARGETS
from sedd_scale.interop.assumptions import add_assumptions, assumptions_of

_INDENT = "\n" + " " * 14
FORMATS_HELP = "formats:\n" + "".join(
    f"  {name:<12}{row.about.replace(chr(10), _INDENT)}\n" for name, row in FORMATS.items()
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of a conversion: what the command does unless a subcommand is named."""
    parser = make_parser(
        "sedd-scale convert_ckpt",
        "Write a checkpoint in another format, one tensor after the other: memory is that of the\n"
        "largest tensor. SRC has to be exactly the model that it describes, and nothing is\n"
        "overwritten. `convert_ckpt inspect` shows a checkpoint without reading its weights,\n"
        "`convert_ckpt verify` compares the log-scores of two.",
        "sedd-scale convert_ckpt --from native --to sedd-hf runs/books exported\n"
        "  sedd-scale convert_ckpt inspect checkpoint.pth\n"
        "  sedd-scale convert_ckpt verify runs/books exported",
        notes=FORMATS_HELP,
    )
    add = parser.add_argument
    add("--from", dest="source_format", choices=tuple(FORMATS), required=True, help="format of SRC")
    add("--to", dest="target_format", choices=tuple(TARGETS), required=True, help="format of DST")
    add(
        "--weights",
        choices=("ema", "master"),
        help="take the averaged weights or the last ones alone, as of a run that has yet to begin "
        "(default: everything that DST has room for, and ema where it has room for one kind)",
    )
    add(
        "--shard-gb",
        type=float,
        metavar="GB",
        help="of sedd-hf, hf and hf-causal: start a new file of weights at this many gigabytes "
        "(default: 5)",
    )
    add(
        "--results",
        type=given_path,
        action="append",
        metavar="FILE",
        help="of sedd-hf and hf: what sedd-scale eval_ppl printed of SRC, for the card; may be "
        "repeated",
    )
    add(
        "--noise-parameters",
        type=int,
        metavar="N",
        help="of sedd-train: parameters without state that the optimizer lists after the "
        "network's, as a program whose noise is a module with a parameter expects (default: as "
        "many as in the checkpoint.pth that SRC comes from, else 0)",
    )
    add_assumptions(parser)
    add("source", type=given_path, metavar="SRC", help="checkpoint to read")
    add(
        "target",
        type=given_path,
        metavar="DST",
        help="directory to make; sedd-train may also be one file, such as model.pth",
    )
    return parser


def build_inspect_parser() -> argparse.ArgumentParser:
    """The arguments of `inspect`."""
    parser = make_parser(
        "sedd-scale convert_ckpt inspect",
        "Print a checkpoint's format, model, step and tensors with their sizes.",
        "sedd-scale convert_ckpt inspect checkpoint.pth",
    )
    add_assumptions(parser)
    parser.add_argument("path", type=given_path, metavar="PATH", help="checkpoint of any format")
    return parser


def build_verify_parser() -> argparse.ArgumentParser:
    """The arguments of `verify`."""
    parser = make_parser(
        "sedd-scale convert_ckpt verify",
        "Run two checkpoints of any formats on the same noisy sequences in float32 and print the\n"
        "largest difference of their log-scores.",
        "sedd-scale convert_ckpt verify runs/books exported",
        exit_codes={
            0: "the difference is within the tolerance",
            1: "it is beyond it; or a fault of this program, with a traceback",
        },
    )
    parser.add_argument("first", type=given_path, metavar="A", help="checkpoint of any format")
    parser.add_argument("second", type=given_path, metavar="B", help="checkpoint of any format")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        metavar="NATS",
        help="largest difference that passes (%(default)s); 0: equal bits",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "master"),
        default="ema",
        help="where a checkpoint has both, averaged weights or last ones (%(default)s)",
    )
    add_assumptions(parser)
    return parser


def convert_command(arguments: argparse.Namespace) -> None:
    """Convert and print where to."""
    from sedd_scale.interop.convert import convert

    for name in dict.fromkeys(name for names in TARGETS.values() for name in names):
        value, flag = getattr(arguments, name), "--" + name.replace("_", "-")
        if value is None:
            continue
        takers = [target for target, names in TARGETS.items() if name in names]
        if arguments.target_format not in takers:
            raise ConfigError(f"{flag} is for --to {' or '.join(takers)} alone: leave it out")
        if name != "results" and (not 0 <= value < math.inf or (value == 0 and name == "shard_gb")):
            raise ConfigError(f"{flag} {value} has to be a number above zero: change it")
    given: dict[str, Any] = {"results": arguments.results or ()}
    if arguments.shard_gb is not None:
        given["shard_bytes"] = int(arguments.shard_gb * 1e9)
    convert(
        arguments.source_format,
        arguments.target_format,
        arguments.source,
        arguments.target,
        weights=arguments.weights,
        extra_parameters=arguments.noise_parameters,
        assumptions=assumptions_of(arguments),
        **given,
    )
    print(arguments.target)


def inspect_command(arguments: argparse.Namespace) -> None:
    """Print what a checkpoint is."""
    from sedd_scale.interop.inspection import inspect

    print(inspect(arguments.path, assumptions_of(arguments)))


def verify_command(arguments: argparse.Namespace) -> int:
    """Print how far two checkpoints are apart; 0 within the tolerance, else 1."""
    if not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance {arguments.tolerance}: give a number from 0 on")
    from sedd_scale.interop.verify import verify

    found = verify(
        arguments.first,
        arguments.second,
        weights=arguments.weights,
        assumptions=assumptions_of(arguments),
    )
    within = found.max_difference <= arguments.tolerance  # false of NaN
    print(
        f"max difference {found.max_difference:.3g} of {found.num_scores:,} log-scores up to "
        f"{found.max_score:.3g}: {'within' if within else 'beyond'} the tolerance "
        f"{arguments.tolerance:g}"
    )
    return 0 if within else 1


COMMANDS = {
    "": Command(build_parser, convert_command),
    "convert": Command(build_parser, convert_command),
    "inspect": Command(build_inspect_parser, inspect_command),
    "verify": Command(build_verify_parser, verify_command),
}
