"""What every command shares: subcommands, one-line errors, exit codes, --debug and --version."""

import argparse
import contextlib
import io
import locale
import math
import os
import select
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sedd_scale.errors import ConfigError, SeddScaleError
from sedd_scale.files.task_environment import adopt_slurm_task
from sedd_scale.version import __version__

EXIT_USER_ERROR = 2
STDOUT, STDERR = 1, 2
EXIT_INTERRUPTED = 130
EXIT_CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended
COMMON_EXIT_CODES = {
    0: "done",
    1: "a fault of this program, with a traceback",
    EXIT_USER_ERROR: "an error of arguments, configuration, data or files, in one line",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
}


class Command(NamedTuple):
    """What a name on the command line runs.

    Attributes:
        build_parser: makes its arguments; imports nothing heavy.
        run: does it, and gives the exit code; None: 0.
        intermixed: positional arguments may stand before and after options.
    """

    build_parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int | None]
    intermixed: bool = False


def run_one_of(commands: Mapping[str, Command], argv: Sequence[str]) -> int:
    """Run the command that the first word names, or the one under "" where it names none."""
    named = argv[0] if argv and argv[0] in commands else ""
    words = argv[1:] if named else argv
    build_parser, run, intermixed = commands[named]
    return run_command(build_parser(), run, words, intermixed=intermixed)


def nearest(name: str, known: Sequence[str], *, most: int = 3) -> str:
    """The known names closest to `name` in spelling, for an error: "a, b or c"."""
    close = get_close_matches(name, known, n=most) or get_close_matches(name, known, 1, 0.0)
    *first, last = close
    return f"{', '.join(first)} or {last}" if first else last


def make_parser(
    prog: str,
    description: str,
    example: str,
    *,
    exit_codes: Mapping[int, str] | None = None,
    notes: str = "",
) -> argparse.ArgumentParser:
    """An argument parser with the flags that every command has.

    Args:
        prog: how the command is called.
        description: one sentence on what the command does.
        example: a command line that works, shown by --help.
        exit_codes: what they mean, where the command has more than 0 and 2 or means more by them.
        notes: shown before the example.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    _add_common(parser, example, exit_codes, notes)
    return parser


def given_path(text: str) -> Path:
    """A path, as an argument's `type`: an empty one, as of an unset variable, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: give a path")
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    """An integer of at least that much, as an argument's `type`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: give at least {least}")
        return value

    return parse


count = at_least(1)


def positive(text: str) -> float:
    """A finite number above 0, as an argument's `type`."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def add_command(
    subparsers: Any,
    name: str,
    *,
    help: str,
    example: str,
    description: str | None = None,
    exit_codes: Mapping[int, str] | None = None,
) -> argparse.ArgumentParser:
    """The parser of a subcommand, with the same flags and the same closing lines.

    Args:
        subparsers: what `add_subparsers` gave.
        help: a line in the list of subcommands.
        example, exit_codes: as `make_parser`.
        description: more than `help` says.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=description or f"{help[:1].upper()}{help[1:]}."
    )
    # Another default would overwrite a --debug given before the subcommand.
    _add_common(parser, example, exit_codes, debug_default=argparse.SUPPRESS)
    return parser


def _add_common(
    parser: argparse.ArgumentParser,
    example: str,
    exit_codes: Mapping[int, str] | None,
    notes: str = "",
    debug_default: Any = False,
) -> None:
    # argparse wraps no text of a parser whose epilog keeps its lines.
    width = max(shutil.get_terminal_size().columns - 2, 11)
    lines = (parser.description or "").splitlines()
    parser.description = "\n".join(textwrap.fill(line, width) for line in lines)
    parser.epilog = _epilog(example, exit_codes, notes)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--debug",
        action="store_true",
        default=debug_default,
        help="show a traceback with an error",
    )
    parser.add_argument("--version", action="version", version=f"sedd_scale {__version__}")


def _words(error: Exception) -> str:
    """What an error says; of a file, its name and what was wrong, without the system's number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe without a reader; other pipes and sockets break too."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _stdout_fault() -> str | None:
    """Why standard output takes no more, as on a full disk; None: it does."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
            os.write(sys.stdout.fileno(), b"")  # what is written at once left nothing to flush
    except OSError as error:
        return error.strerror
    return None


def _leave_stdout() -> None:
    """Let what cannot be written go; Python flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno() if sys.stdout else STDOUT)


class _Outlived(io.FileIO):
    """An output that ends no work: what it does not take is let go, or told on standard error."""

    notice = ""
    on_stderr = False

    def write(self, content: Any) -> int:
        try:
            return super().write(content) or 0
        except OSError as error:
            if self.notice:
                print(f"{self.notice} ({error.strerror})", file=sys.stderr)
                self.notice = ""
            if self.on_stderr:
                sys.stderr.write(bytes(content).decode(errors="replace"))
            return len(content)


def _outlived(stream: TextIO | None, number: int, **options: Any) -> tuple[_Outlived, TextIO]:
    """Standard output or error, or nothing where it is closed, as `_Outlived`."""
    to = os.open(os.devnull, os.O_WRONLY) if stream is None else number
    raw = _Outlived(to, "w", closefd=stream is None)
    buffer: Any = raw
    return raw, io.TextIOWrapper(buffer, getattr(stream, "encoding", "utf-8"), **options)


def outlive_stdout(notice: str, *, on_stderr: bool = False) -> None:
    """Let a full disk or a closed pipe behind standard output end no work that begins now.

    Args:
        notice: said on standard error when it takes no more.
        on_stderr: what it does not take follows there; else it is let go.
    """
    if sys.stdout is sys.__stdout__:
        if sys.stdout is not None:
            sys.stdout.flush()
        raw, sys.stdout = _outlived(sys.stdout, STDOUT, errors="replace", line_buffering=True)
        raw.notice, raw.on_stderr = notice, on_stderr


def outlive_outputs() -> None:
    """Let no character, and nothing on standard error, end the work."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if sys.stderr is sys.__stderr__:
        _, sys.stderr = _outlived(sys.stderr, STDERR, errors="backslashreplace", write_through=True)
    # Libraries read their own files by the locale's encoding.
    if locale.nl_langinfo(locale.CODESET) == "ANSI_X3.4-1968":
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def need_stdout(instead: str) -> None:
    """Refuse to begin where standard output, the only place of a result, is closed.

    Args:
        instead: the option that names another place.

    Raises:
        ConfigError: it is closed.
    """
    if sys.stdout is None:
        raise ConfigError(f"standard output is closed and the result would be lost: give {instead}")


def print_result(text: str) -> None:
    """Print a result that took long; where standard output takes it no more, on standard error.

    Raises:
        OSError: standard output does not take it.
    """
    try:
        print(text, flush=True)
    except OSError:
        print(f"standard output does not take the result, which is:\n{text}", file=sys.stderr)
        raise


def _epilog(example: str, exit_codes: Mapping[int, str] | None, notes: str = "") -> str:
    codes = sorted({**COMMON_EXIT_CODES, **(exit_codes or {})}.items())
    lines = "\n".join(f"  {code:<3} {meaning}" for code, meaning in codes)
    notes = notes and f"{notes.strip()}\n\n"
    return f"{notes}example:\n  {example}\n\nexit codes:\n{lines}"


def run_command(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    *,
    intermixed: bool = False,
) -> int:
    """Parse `argv`, run `command` and return its exit code.

    With `intermixed` positional arguments may stand before and after options. `command` finds the
    line it was called by in `arguments.command_line`. In a step of Slurm the process first learns
    its place among the others.

    A `SeddScaleError` or an error of the operating system becomes one line on stderr and its exit
    code, mostly 2; with --debug the traceback is shown. In a job of several processes each rank
    that fails says so and leaves at once, so that the launcher stops the others. A reader of the
    output that has seen enough, as in `... | head`, ends it without a word.
    """
    outlive_outputs()
    # DeepSpeed calls collectives under names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    parse = parser.parse_intermixed_args if intermixed else parser.parse_args
    words = sys.argv[1:] if argv is None else argv
    arguments = parse(words)
    arguments.command_line = shlex.join([*parser.prog.split(), *words])
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
            _leave_stdout()
            return EXIT_CLOSED_PIPE
        if arguments.debug:
            raise
        message = " ".join(_words(error).split())
        if isinstance(error, OSError) and error.filename is None and (fault := _stdout_fault()):
            _leave_stdout()
            message = f"standard output cannot be written: {fault}; what was written to files stays"
        rank = os.environ.get("RANK", "0")
        if rank == "0" or "WORLD_SIZE" not in os.environ:
            print(f"{parser.prog}: error: {message}", file=sys.stderr, flush=True)
        else:
            print(f"{parser.prog}: rank {rank}: {message}", file=sys.stderr, flush=True)
        return error.exit_code if isinstance(error, SeddScaleError) else EXIT_USER_ERROR
