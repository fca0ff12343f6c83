"""Convert a checkpoint between formats."""

import argparse
import sys
from pathlib import Path

from sedd_scale.cli import make_parser, run_command

FORMATS = ("native", "sedd-hf", "sedd-train", "mdlm")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = make_parser(
        "Convert a checkpoint; this version converts sedd-hf to native and native to sedd-hf.",
        "python tools/convert_ckpt.py --from sedd-hf --to native louaaron-sedd-small runs/small",
    )
    add = parser.add_argument
    kinds = (
        "native (a run directory), sedd-hf (config.json and model.safetensors), sedd-train, mdlm"
    )
    add("--from", dest="source_format", choices=FORMATS, required=True, help=f"of SRC: {kinds}")
    add("--to", dest="target_format", choices=FORMATS, required=True, help="of DST")
    add(
        "--weights",
        choices=("ema", "master"),
        default="ema",
        help="of a native SRC, the averaged weights or the last ones (%(default)s)",
    )
    add("source", type=Path, metavar="SRC", help="checkpoint to read")
    add("target", type=Path, metavar="DST", help="directory to make")
    return parser


def convert_command(arguments: argparse.Namespace) -> None:
    """Convert and print where to."""
    from sedd_scale.interop.convert import convert

    convert(
        arguments.source_format,
        arguments.target_format,
        arguments.source,
        arguments.target,
        weights=arguments.weights,
    )
    print(arguments.target)


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), convert_command))
