"""Numbers in words: counts and durations."""

import math


def format_count(value: float) -> str:
    """Three digits and a suffix: 950, 12.3k, 4.56M."""
    for suffix in ("", "k", "M", "G"):
        digits = 0 if not suffix and value >= 100 else 2 if value < 10 else 1 if value < 100 else 0
        if round(value, digits) < 1000:
            return f"{value:.{digits}f}{suffix}"
        value /= 1000.0
    return f"{value:.1f}T"


def with_error(value: float, error: float, sign: str) -> str:
    """A number and its standard error, if it has one: 5.0912 ± 0.5598."""
    return f"{value:.4f}" + (f" {sign} {error:.4f}" if math.isfinite(error) else "")


def format_duration(seconds: float) -> str:
    """The two largest units: 41s, 3m12s, 2h05m, 1d07h."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"
