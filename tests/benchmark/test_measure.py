"""Peaks of known allocations, and rounds that run every program in turn."""

import time

import torch

from sedd_scale.benchmark.measure import median_seconds, peak_bytes


def test_the_peak_is_what_was_alive_at_once() -> None:
    kept = torch.ones(1_000_000)

    def program() -> None:
        first = torch.ones(1_000_000)
        second = first + kept
        del first
        third = second[:500_000] * 2.0  # a view takes nothing
        del second
        torch.cat([third, third])

    # first and second; second and third are less, and so are third and what is made of it.
    assert 8_000_000 <= peak_bytes(program) < 8_100_000


def test_allocations_inside_an_operator_count() -> None:
    columns = torch.ones(1000, 1000)[:, ::2]
    assert peak_bytes(lambda: torch.logsumexp(columns, 1)) >= 1000 * 500 * 4


def test_rounds_alternate_and_the_median_ignores_an_odd_one() -> None:
    runs: list[str] = []

    def quick() -> None:
        runs.append("quick")

    def slow() -> None:
        runs.append("slow")
        time.sleep(0.5 if runs.count("slow") == 2 else 0.02)

    seconds = median_seconds([quick, slow], repeats=3, warm_up=1)
    assert runs == ["quick", "slow"] * 4
    assert seconds[0] < 0.01
    assert 0.02 <= seconds[1] < 0.2
