"""sedd-scale NAME: one program for every command; `python -m sedd_scale NAME` is the same."""

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from sedd_scale.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR, make_parser, run_one_of
from sedd_scale.commands import COMMANDS
from sedd_scale.errors import LostRankError

PROG = "sedd-scale"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0].startswith("-"):
        names = "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items())
        parser = make_parser(
            PROG,
            "Pretraining of score-entropy discrete diffusion language models.\n"
            f"`{PROG} COMMAND --help` shows a command's arguments.",
            f"{PROG} doctor",
            notes=f"commands:\n{names}",
        )
        parser.add_argument("command", metavar="COMMAND", help="one of the list below")
        parser.parse_args(words)
    name, *rest = words
    name = name.replace("-", "_")
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"`{PROG} --help` lists them"
        print(f"{PROG}: error: no command {name}; {hint}", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        command = importlib.import_module(f"sedd_scale.commands.{name}")
    except KeyboardInterrupt:
        print(f"{PROG} {name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    code = run_one_of(command.COMMANDS, rest)
    if code == LostRankError.exit_code:
        # What is left open waits for a rank that is gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
