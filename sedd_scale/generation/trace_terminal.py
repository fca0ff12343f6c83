"""Traced samples played in a terminal; elsewhere, a few frames as plain text."""

import math
import re
import shutil
import time
import unicodedata
from typing import Any, TextIO

from sedd_scale.generation.trace import Frame, trace_of

MASK = "░"
PLAIN_FRAMES = 6
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_BOLD, _NEW, _RESET = "\x1b[1m", "\x1b[7m", "\x1b[0m"
_HIDE, _SHOW, _CLEAR_DOWN = "\x1b[?25l", "\x1b[?25h", "\x1b[J"


def play(record: dict[str, Any], stream: TextIO, *, steps_per_second: float) -> None:
    """Show one record's trace, frame over frame on a terminal, or some frames one below another.

    Raises:
        DataError: the record has no trace.
    """
    trace = trace_of(record)
    frame = Frame(trace)
    if not stream.isatty():
        _print_frames(record, frame, len(trace["events"]), stream)
        return
    size = shutil.get_terminal_size()
    shown = 0
    stream.write(_HIDE)
    try:
        event = None
        while True:
            lines = _wrapped(frame, size.columns, escapes=True)[: max(1, size.lines - 2)]
            lines.insert(0, _title(record, event))
            up = f"\x1b[{shown}A" if shown else ""
            stream.write(f"\r{up}{_CLEAR_DOWN}" + "\n".join(lines) + "\n")
            stream.flush()
            shown = len(lines)
            time.sleep(1 / steps_per_second)
            event = frame.advance()
            if event is None:
                break
    finally:
        stream.write(_SHOW + _RESET)
        stream.flush()


def _print_frames(record: dict[str, Any], frame: Frame, events: int, stream: TextIO) -> None:
    shown = {math.ceil(k * events / (PLAIN_FRAMES - 1)) for k in range(PLAIN_FRAMES)}
    event = None
    for number in range(events + 1):
        if number:
            event = frame.advance()
        if number in shown:
            stream.write(f"{_title(record, event)}\n")
            stream.write("\n".join(_wrapped(frame, 100, escapes=False)) + "\n\n")


def _title(record: dict[str, Any], event: dict[str, Any] | None) -> str:
    when = "start, time 1" if event is None else f"step {event['step']}, time {event['time']:.4f}"
    return f"--- sample {record['id']}: {when}"


def _wrapped(frame: Frame, width: int, *, escapes: bool) -> list[str]:
    """The text in lines of at most `width` columns; given text bold, the newest reversed."""
    lines, column = [""], 0
    newest = max(frame.filled, default=-1)
    for piece, filled in zip(frame.pieces, frame.filled):
        style = ""
        if escapes and piece is not None:
            style = _BOLD if filled < 0 else _NEW if filled == newest else ""
        # Text must not move the cursor.
        shown = MASK * 2 if piece is None else _CONTROL.sub("\ufffd", piece.expandtabs(4))
        lines[-1] += style
        for character in shown:
            columns = _columns(character)
            if character == "\n" or column + columns > width:
                lines[-1] += _RESET if style else ""
                lines.append(style)
                column = 0
            if character != "\n":
                lines[-1] += character
                column += columns
        lines[-1] += _RESET if style else ""
    return lines


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
