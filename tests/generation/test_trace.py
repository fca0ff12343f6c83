"""A trace replays to the sample it is of, and is shown without touching anything else."""

import html.parser
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedd_scale.errors import DataError
from sedd_scale.generation.trace import Frame, Trace, TraceRecorder, trace_of
from sedd_scale.generation.trace_page import trace_page
from sedd_scale.generation.trace_terminal import MASK, play
from sedd_scale.sampling.infill import Given, infill_from_ends
from sedd_scale.tokenizers.alphabets import BytesTokenizer, Text8Tokenizer

TEXT8 = Text8Tokenizer()
MASK_ID = TEXT8.vocab_size


def record_steps(infill: Given, states: list[list[int]], *, mask_id: int | None) -> Trace:
    """The trace of row 1 of a batch in which row 0 never changes and rows have a filling end."""
    recorder = TraceRecorder({1: infill}, mask_id=mask_id)
    for step, state in enumerate(states):
        state_BL = torch.tensor([[5] * (len(state) + 2), [*state, 9, 9]])
        recorder.on_step(step, torch.tensor([0.5, 1 - 0.25 * (step + 1)]), state_BL)
    return recorder.traces(TEXT8)[1]


def frames(trace: Trace) -> list[str]:
    frame = Frame(trace)
    shown = ["".join(piece or "." for piece in frame.pieces)]
    while frame.advance() is not None:
        shown.append("".join(piece or "." for piece in frame.pieces))
    return shown


def example() -> Trace:
    """A space appears, then a token that is taken back, then the end; one step changes nothing."""
    a, b, space = 1, 2, 0
    infill = infill_from_ends("a", "b", TEXT8, 4)
    return record_steps(
        infill,
        [
            [a, space, MASK_ID, b],
            [a, space, MASK_ID, b],
            [a, MASK_ID, a, b],
            [a, b, a, b],
        ],
        mask_id=MASK_ID,
    )


def test_a_trace_replays_every_change() -> None:
    trace = example()
    assert frames(trace) == ["a..b", "a .b", "a.ab", "abab"]
    assert [event["step"] for event in trace["events"]] == [0, 2, 3]
    assert [event["time"] for event in trace["events"]] == [0.75, 0.25, 0.0]
    assert trace["events"][1]["tokens"] == [None, 1]
    assert json.loads(json.dumps(trace)) == trace


def test_without_masks_the_first_step_brings_every_free_token() -> None:
    free = Given(np.array([0, 3]), np.array([False, True]))
    assert frames(record_steps(free, [[7, 3], [8, 3]], mask_id=None)) == [".c", "gc", "hc"]


def test_a_byte_that_is_no_text_has_a_piece() -> None:
    recorder = TraceRecorder({0: infill_from_ends("", "x", BytesTokenizer(), 3)}, mask_id=257)
    recorder.on_step(0, torch.tensor([0.0]), torch.tensor([[0xC3, 0x41, ord("x")]]))
    (event,) = recorder.traces(BytesTokenizer())[0]["events"]
    assert event["pieces"] == ["\ufffd", "A"]
    assert recorder.traces(None)[0]["events"][0]["pieces"] == [" 195", " 65"]


def sample(trace: Trace, **more: Any) -> dict[str, Any]:
    return {"id": "x", "seed": 3, "settings": {"sampler": "euler"}, "trace": trace, **more}


class Page(html.parser.HTMLParser):
    """The data of the page, and every address that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.data, self.addresses, self._in_data = "", [], False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_data = ("id", "data") in attrs
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data


def test_the_page_holds_its_data_and_asks_for_nothing() -> None:
    trace = example()
    trace["events"][0]["pieces"][0] = "</script><script>alert('x')"
    page = trace_page([sample(trace)])
    parser = Page()
    parser.feed(page)
    (shown,) = json.loads(parser.data)
    assert shown["pieces"] == trace["pieces"]
    assert shown["events"] == [
        [event["step"], event["time"], event["positions"], event["pieces"]]
        for event in trace["events"]
    ]
    assert parser.addresses == []
    assert page.count("<script") == 2 and "default-src 'none'" in page


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_played_on_a_terminal_it_leaves_the_cursor_visible_and_obeys_no_text() -> None:
    trace = example()
    trace["events"][-1]["pieces"][0] = "\x1b[2J"
    stream = Terminal()
    play(sample(trace), stream, steps_per_second=1e6)
    shown = stream.getvalue()
    assert "\x1b[2J" not in shown and "\ufffd[2J" in shown
    assert shown.count("--- sample x:") == 4
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")


def test_elsewhere_frames_are_plain_text_from_start_to_end() -> None:
    stream = io.StringIO()
    play(sample(example()), stream, steps_per_second=8)
    lines = [line for line in stream.getvalue().splitlines() if line]
    assert lines[:2] == ["--- sample x: start, time 1", f"a{MASK * 4}b"]
    assert lines[-2:] == ["--- sample x: step 3, time 0.0000", "abab"]
    assert "\x1b" not in stream.getvalue()


def test_records_without_a_readable_trace_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample 'x' has no trace"):
        trace_of({"id": "x"})
    damaged = example()
    damaged["events"][0]["positions"][0] = 4
    with pytest.raises(DataError, match="trace of sample 'x' is damaged"):
        trace_of(sample(damaged))
