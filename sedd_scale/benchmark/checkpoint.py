"""Saving and loading checkpoints, beside the disk's own speed in the same run.

The training's engine holds the state. A synchronous save, a save in the background, a load with and
without hashing, and a plain file of as many bytes, written and fsynced in the same directory.
"""

import argparse
import functools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sedd_scale.benchmark.arguments import add_measured_arguments, add_shape_arguments
from sedd_scale.benchmark.report import environment, run_measured
from sedd_scale.cli import add_command, given_path

_CHUNK = 1 << 23


def add_arguments(subparsers: Any) -> None:
    """Register `checkpoint` and its options."""
    parser = add_command(
        subparsers,
        "checkpoint",
        help="saving and loading the state of a run",
        example="sedd-scale benchmark checkpoint --model tiny --repeats 3 --json",
    )
    add_measured_arguments(parser, repeats=3)
    parser.add_argument(
        "--folder", type=given_path, help="where to write (default: the temporary directory)"
    )
    add_shape_arguments(parser, model="small")
    parser.set_defaults(run=functools.partial(run_measured, measure=measure))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report: medians over the rounds."""
    from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config
    from sedd_scale.checkpoint.reading import load_checkpoint
    from sedd_scale.checkpoint.writer import CheckpointWriter
    from sedd_scale.parallel.layout import initialize_layout

    config = synthetic_config(arguments, "training.precision=fp32", world_size=1)
    layout = initialize_layout()
    engine = SyntheticRun(config, layout).engine()
    engine.fragments.ensure_state()
    about = dict.fromkeys(("config", "dataset_fingerprint", "tokenizer_fingerprint"))
    about |= {"samples_seen": 0, "tokens": 0, "num_tokens": 0, "block_length": 0}
    seconds: dict[str, list[float]] = {}

    def record(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    num_bytes = 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run_dir = Path(folder)
        checkpoint = config.override("checkpoint.keep=1").checkpoint
        synchronous = config.override("checkpoint.keep=1", "checkpoint.async_save=false").checkpoint
        with (
            CheckpointWriter(run_dir, engine.fragments, config=synchronous) as plain,
            CheckpointWriter(run_dir, engine.fragments, config=checkpoint) as background,
        ):
            for turn in range(arguments.repeats + 1):  # the first makes memory and plan
                times: dict[str, float] = {}
                begun = time.perf_counter()
                plain.save({"step": 2 * turn + 1, **about})
                times["save_seconds"] = time.perf_counter() - begun
                begun = time.perf_counter()
                background.save({"step": 2 * turn + 2, **about})
                times["blocked_seconds"] = time.perf_counter() - begun
                report = background.wait()
                assert report is not None
                times["background_seconds"] = report.seconds
                for name, verify in (("load_seconds", True), ("load_unverified_seconds", False)):
                    begun = time.perf_counter()
                    load_checkpoint(run_dir, engine.fragments, verify=verify)
                    times[name] = time.perf_counter() - begun
                files = [path for path in report.path.rglob("*") if path.is_file()]
                num_bytes = sum(path.stat().st_size for path in files)
                shutil.rmtree(report.path)
                times["disk_seconds"] = _write(run_dir / "plain", num_bytes)
                if turn:
                    for name, value in times.items():
                        record(name, value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "part": "checkpoint",
        "model": arguments.model,
        "bytes": num_bytes,
        "repeats": arguments.repeats,
        **medians,
        "bytes_per_second": num_bytes / medians["save_seconds"],
        "disk_bytes_per_second": num_bytes / medians["disk_seconds"],
        "share_of_disk_speed": medians["disk_seconds"] / medians["save_seconds"],
        "blocked_share_of_save": medians["blocked_seconds"] / medians["save_seconds"],
        **environment(),
    }


def _write(path: Path, num_bytes: int) -> float:
    """Seconds to write and fsync a plain file of this size."""
    chunk = os.urandom(_CHUNK)
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as stream:
        left = num_bytes
        while left > 0:
            left -= stream.write(chunk[:left])
        os.fsync(stream.fileno())
    elapsed = time.perf_counter() - begun
    path.unlink()
    return elapsed
