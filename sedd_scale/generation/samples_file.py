"""A file of finished samples: reading it, and the report that stands beside it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sedd_scale.errors import DataError
from sedd_scale.files.atomic import write_atomically
from sedd_scale.generation.judge import Judge, perplexities
from sedd_scale.generation.quality import QualityReport
from sedd_scale.parallel.agreement import gathered
from sedd_scale.preparation.document_formats import object_of
from sedd_scale.preparation.documents import open_rows

Record = dict[str, Any]
_TEXTS_AT_A_TIME = 64


def report_path(samples: Path) -> Path:
    """Where the report of a file of samples stands: samples.jsonl -> samples.report.json."""
    return samples.with_name(samples.stem + ".report.json")


def read_samples(path: Path) -> Iterator[Record]:
    """The records of a file, one at a time.

    Raises:
        DataError: the file is missing or empty, or a line holds no sample; it is named.
    """
    if not path.exists():
        raise DataError(f"there is no samples file {path}: give what sedd-scale generate wrote")
    found = False
    for row in open_rows(path):
        found, record = True, object_of(row)
        tokens = record.get("tokens")
        if not isinstance(tokens, list) or any(
            type(token) is not int or not 0 <= token < 2**31 for token in tokens
        ):
            raise DataError(
                f"{row.where} holds no list of token ids: give what sedd-scale generate wrote"
            )
        yield record
    if not found:
        raise DataError(f"samples file {path} is empty: it holds no samples to report on")


def traced_samples(path: Path) -> list[Record]:
    """The records of a file that have a trace.

    Raises:
        DataError: none has, or the file cannot be read.
    """
    traced = [record for record in read_samples(path) if "trace" in record]
    if not traced:
        raise DataError(f"{path} holds no traced sample: generate with --trace")
    return traced


def quality_of_file(path: Path) -> dict[str, Any]:
    """The quality report of a file of samples (see `QualityReport.result`)."""
    quality = QualityReport()
    for record in read_samples(path):
        quality.add(record["tokens"])
    return quality.result()


def judge_file(
    path: Path, judge: str, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> dict[str, Any]:
    """Generative perplexity of a file of samples; collective over `world_size` processes.

    Every process scores its share of the samples; all get the result of `perplexities`, with the
    judge's name and its context in tokens.

    Raises:
        DataError: the judge or the file cannot be read, or a sample has no text.
        ConfigError: a package is missing.
    """
    model = Judge(judge, device)
    own: dict[int, Any] = {}
    numbers: list[int] = []
    texts: list[str] = []

    def flush() -> None:
        own.update(zip(numbers, model.scores(texts)))
        numbers.clear()
        texts.clear()

    for number, record in enumerate(read_samples(path)):
        if number % world_size != rank:
            continue
        if not isinstance(record.get("text"), str):
            raise DataError(
                f"sample {record.get('id')!r} has no text for a judge to read: generate with "
                "--tokenizer-path"
            )
        numbers.append(number)
        texts.append(record["text"])
        if len(texts) == _TEXTS_AT_A_TIME:
            flush()
    flush()
    merged = {number: score for part in gathered(own) for number, score in part.items()}
    scores = [merged[number] for number in range(len(merged))]
    return {"judge": judge, "context": model.context, **perplexities(scores)}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON; what is not finite becomes null."""
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", errors="replace"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
