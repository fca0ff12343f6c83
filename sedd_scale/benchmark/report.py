"""What a benchmark prints: a table for a person and one JSON object for a program."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

from sedd_scale.version import now, versions


def environment() -> dict[str, Any]:
    """Where and when the measurement was made: device, versions and time."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "measured": now(),
    }


def run_measured(
    arguments: argparse.Namespace, *, measure: Callable[[argparse.Namespace], dict[str, Any]]
) -> None:
    """Measure and, on the first process, report; under a launcher every process calls this."""
    import torch

    from sedd_scale.parallel.layout import shutdown

    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    if int(os.environ.get("RANK", "0")) == 0:
        print_report(result, as_json=arguments.json)
    shutdown()


def side_by_side(
    seconds: Sequence[float], extra_mb: Sequence[float], *, tokens: int | None = None
) -> dict[str, float | None]:
    """Time and memory of ours and, where it was measured, of the baseline.

    Args:
        tokens: how many were processed in that time.
    """
    values: dict[str, float | None] = {}
    for name, numbers in (("seconds", seconds), ("extra_mb", extra_mb)):
        values[name], values[f"baseline_{name}"] = (*numbers, None)[:2]
    values["speedup"] = seconds[1] / seconds[0] if len(seconds) > 1 else None
    if tokens is not None:
        rates = [tokens / part for part in seconds]
        values["tokens_per_second"], values["baseline_tokens_per_second"] = (*rates, None)[:2]
    return values


def print_report(result: dict[str, Any], *, as_json: bool) -> None:
    """Print `result` as a table, and with `as_json` as one JSON object on the last line."""
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {_text(value)}")
    if as_json:
        print(json.dumps(result))


def _text(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
