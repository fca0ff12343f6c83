"""Options that several benchmarks share."""

import argparse


def add_shape_arguments(
    parser: argparse.ArgumentParser,
    *,
    model: str,
    batch: int = 2,
    accumulate: int = 1,
    length: int = 1024,
    vocab: int = 50257,
) -> None:
    """What is trained, with the benchmark's own defaults; see `synthetic.synthetic_config`."""
    parser.add_argument(
        "--model", default=model, help=f"of configs/models, or a YAML file (default: {model})"
    )
    for name, default, meaning in (
        ("--batch-size", batch, "sequences in a forward pass of a rank"),
        ("--accumulate", accumulate, "forward passes in a step"),
        ("--block-length", length, "positions of a sequence"),
        ("--vocab-size", vocab, "tokens N"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the configuration"
    )


def add_measured_arguments(
    parser: argparse.ArgumentParser, *, repeats: int | None, baseline: str | None = None
) -> None:
    """How it is measured and reported; see `report.run_measured`.

    Args:
        repeats: rounds by default; None: no such option.
        baseline: what `--baseline` measures too; None: no such option.
    """
    add = parser.add_argument
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    if repeats is not None:
        meaning = f"measured rounds (default: {repeats})"
        add("--repeats", type=int, default=repeats, help=meaning)
    if baseline is not None:
        add("--baseline", action="store_true", help=f"measure {baseline} too")
    add("--json", action="store_true", help="end with one JSON object")
