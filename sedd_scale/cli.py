"""What every command shares: one-line errors, exit codes and the --debug and --version flags."""

import argparse
import os
import select
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sedd_scale.errors import SeddScaleError
from sedd_scale.files.task_environment import adopt_slurm_task
from sedd_scale.version import __version__

EXIT_USER_ERROR = 2
STDOUT = 1
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
COMMON_EXIT_CODES = {
    0: "done",
    1: "a fault of this program, with a traceback",
    EXIT_USER_ERROR: "an error of arguments, configuration, data or files, in one line",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
}


def make_parser(
    description: str,
    example: str,
    *,
    exit_codes: Mapping[int, str] | None = None,
    prog: str | None = None,
) -> argparse.ArgumentParser:
    """An argument parser with the flags that every command has.

    Args:
        description: one sentence on what the command does.
        example: a command line that works, shown by --help.
        exit_codes: what they mean, where the command has more than 0 and 2 or means more by them.
        prog: its name, if other than that of the file.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=_epilog(example, exit_codes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    parser.add_argument("--version", action="version", version=f"sedd_scale {__version__}")
    return parser


def given_path(text: str) -> Path:
    """A path, as an argument's `type`: an empty one, as of an unset variable, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return Path(text)


def add_command(
    subparsers: Any,
    name: str,
    *,
    help: str,
    example: str,
    description: str | None = None,
    exit_codes: Mapping[int, str] | None = None,
    notes: str = "",
) -> argparse.ArgumentParser:
    """The parser of a subcommand, with the same flags and the same closing lines.

    Args:
        subparsers: what `add_subparsers` gave.
        help: a line in the list of subcommands.
        example, exit_codes: as `make_parser`.
        description: more than `help` says.
        notes: shown before the example.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help,
        description=description or f"{help[:1].upper()}{help[1:]}.",
        epilog="\n\n".join(filter(None, (notes.strip("\n"), _epilog(example, exit_codes)))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # What stands before the subcommand is not taken back.
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show a traceback with an error",
    )
    parser.add_argument("--version", action="version", version=f"sedd_scale {__version__}")
    return parser


def _nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe without a reader; other pipes and sockets break too."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _epilog(example: str, exit_codes: Mapping[int, str] | None) -> str:
    codes = sorted({**COMMON_EXIT_CODES, **(exit_codes or {})}.items())
    lines = "\n".join(f"  {code:<3} {meaning}" for code, meaning in codes)
    return f"example:\n  {example}\n\nexit codes:\n{lines}"


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    intermixed: bool = False,
) -> int:
    """Parse `argv`, run `command` and return its exit code.

    With `intermixed` positional arguments may stand before and after options. In a step of Slurm
    the process first learns its place among the others.

    A `SeddScaleError` or an error of the operating system becomes one line on stderr and its exit
    code, mostly 2; with --debug the traceback is shown. In a job of several processes each rank
    that fails says so and leaves at once, so that the launcher stops the others. A reader of the
    output that has seen enough, as in `... | head`, ends it without a word.
    """
    # Megatron-core warns of every optional package that is not installed, in every process, and
    # DeepSpeed calls collectives under names that torch is about to retire.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    parse = parser.parse_intermixed_args if intermixed else parser.parse_args
    arguments = parse(argv)
    try:
        adopt_slurm_task(os.environ)
        code = command(arguments) or 0
        if sys.stdout is not None:  # closed by whoever started the program
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print(f"{parser.prog}: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except (SeddScaleError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            # Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
            return EXIT_CLOSED_PIPE
        if arguments.debug:
            raise
        message = " ".join(str(error).split())
        rank = os.environ.get("RANK", "0")
        if rank == "0" or "WORLD_SIZE" not in os.environ:
            print(f"{parser.prog}: error: {message}", file=sys.stderr, flush=True)
        else:
            print(f"{parser.prog}: rank {rank}: {message}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, SeddScaleError) else EXIT_USER_ERROR
