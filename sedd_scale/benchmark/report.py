"""What a benchmark prints: a table for a person and one JSON object for a program."""

import json
import platform
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
