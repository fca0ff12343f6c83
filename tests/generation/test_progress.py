"""Progress as one line, its rate and the time left."""

import io
import time

from sedd_scale.generation.progress import Done, ProgressLine, progress_line


def test_the_line_counts_all_and_extrapolates_this_session() -> None:
    shown = progress_line(
        Done(10, 1000, 50), total_samples=100, samples_before=60, total_work=200, seconds=20.0
    )
    # A quarter of this session's work took 20 s.
    assert shown == "70 of 100 samples, 50 tokens/s, 1m00s left"
    nothing = progress_line(
        Done(0, 0, 0), total_samples=100, samples_before=60, total_work=200, seconds=20.0
    )
    assert nothing == "60 of 100 samples"
    end = progress_line(
        Done(40, 4000, 200), total_samples=100, samples_before=60, total_work=200, seconds=61.0
    )
    assert end == "100 of 100 samples, 66 tokens/s, 1m01s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO) -> str:
    done = [Done(0, 0, 0)]
    with ProgressLine(
        lambda: done[0],
        total_samples=3,
        samples_before=0,
        total_work=3,
        stream=stream,
        seconds=0.02,
    ):
        for number in range(1, 4):
            time.sleep(0.05)
            done[0] = Done(number, number, number)
        time.sleep(0.05)
    return stream.getvalue()


def test_a_terminal_has_one_line_and_a_file_has_lines() -> None:
    on_terminal, in_file = run(Terminal()), run(io.StringIO())
    assert on_terminal.count("\n") == 1 and on_terminal.endswith("\n")
    assert "3 of 3 samples" in on_terminal.split("\r")[-1]
    assert "\r" not in in_file
    lines = in_file.splitlines()
    assert len(lines) >= 3 and all("of 3 samples" in line for line in lines)
