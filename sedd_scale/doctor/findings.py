"""One line of the doctor's report, and the report made of them."""

import shutil
import textwrap
from collections.abc import Sequence
from typing import NamedTuple, TextIO

GOOD, OPTIONAL, NOTICE, BAD = "ok", "-", "note", "FAIL"


class Finding(NamedTuple):
    """What was found of one thing."""

    name: str
    verdict: str
    """`GOOD`; `OPTIONAL`: absent, and nothing needs it; `NOTICE`: it works, but look at it; `BAD`:
    the program does not work without it."""
    detail: str
    fix: str | None = None
    """How to get or mend it: a command, or a few words."""


def print_finding(finding: Finding, stream: TextIO) -> None:
    """Print one finding, its fix below it, no wider than the terminal."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    lines = textwrap.wrap(
        finding.detail, width - 25, break_long_words=False, break_on_hyphens=False
    ) or [""]
    print(f"{finding.name:<18} {finding.verdict:<4} {lines[0]}", file=stream)
    for line in lines[1:]:
        print(f"{'':<23} {line}", file=stream)
    if finding.fix is not None:
        # Not broken into lines: it is there to be copied.
        print(f"{'':<23} -> {finding.fix}", file=stream)
    stream.flush()


def verdict(findings: Sequence[Finding]) -> str:
    """The report's last line."""
    bad = [finding.name for finding in findings if finding.verdict == BAD]
    if bad:
        return f"not ready: mend {', '.join(bad)}, as said above"
    notices = [finding.name for finding in findings if finding.verdict == NOTICE]
    return "ready" + (f"; look at {', '.join(notices)}" if notices else "")
