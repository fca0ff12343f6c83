"""A report as three files: report.md for people, report.json for programs, report.png."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def write_report_files(
    output: Path,
    report: dict[str, Any],
    lines: Sequence[str],
    draw: Callable[..., None],
    *,
    command: str,
    picture: str,
    size: tuple[float, float] = (6.0, 4.0),
    widths: Sequence[float] = (1.0,),
) -> list[Path]:
    """Write all three into `output`; returns report.json, report.md and report.png.

    Args:
        report: what report.json holds, beside the command.
        lines: of report.md; the command and the picture follow.
        draw: draws on matplotlib's axes, as many as there are widths.
        command: that makes the report.
        picture: what it shows.
        size: of the picture in inches.
        widths: of its parts side by side, in any unit.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"report.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps({**report, "command": command}, indent=1) + "\n")
    closing = ["", f"Command: `{command}`", "", f"![{picture}](report.png)", ""]
    paths[1].write_text("\n".join([*lines, *closing]))
    figure, axes = plt.subplots(1, len(widths), figsize=size, width_ratios=widths, squeeze=False)
    draw(*axes[0])
    figure.tight_layout()
    figure.savefig(paths[2], dpi=110)
    plt.close(figure)
    return paths
