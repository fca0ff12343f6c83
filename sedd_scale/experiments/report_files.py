"""A report as three files: report.md for people, report.json for programs, report.png."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_report_files(
    output: Path,
    report: dict[str, Any],
    lines: Sequence[str],
    draw: Callable[[Any], None],
    *,
    command: str,
    picture: str,
    size: tuple[float, float] = (6.0, 4.0),
) -> None:
    """Write all three into `output`.

    Args:
        report: what report.json holds, beside the command.
        lines: of report.md; the command and the picture follow.
        draw: draws on matplotlib's axes.
        command: that makes the report.
        picture: what it shows.
        size: of the picture in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps({**report, "command": command}, indent=1) + "\n")
    closing = ["", f"Command: `{command}`", "", f"![{picture}](report.png)", ""]
    (output / "report.md").write_text("\n".join([*lines, *closing]))
    figure, axes = plt.subplots(figsize=size)
    draw(axes)
    figure.tight_layout()
    figure.savefig(output / "report.png", dpi=110)
    plt.close(figure)
