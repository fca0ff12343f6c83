"""Conversion of checkpoints between our format and those of other programs.

A conversion opens its source, refuses what is not exactly the model it claims to be, reads and
writes one tensor after the other beside its destination under a temporary name, and renames that
when all of it is on disk.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sedd_scale.errors import CheckpointError
from sedd_scale.files.atomic import refuse_existing_output
from sedd_scale.interop import TARGETS
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import CheckpointSource, WeightsOnly
from sedd_scale.interop.exported_directory import write_exported
from sedd_scale.interop.fingerprint import checkpoint_fingerprint
from sedd_scale.interop.foreign_files import TRAINING_FILE
from sedd_scale.interop.formats import open_checkpoint
from sedd_scale.interop.huggingface import write_huggingface
from sedd_scale.interop.model_card import last_validation, model_card, read_report
from sedd_scale.interop.native import write_native_run
from sedd_scale.interop.reference_training import write_reference_training
from sedd_scale.interop.safetensors_files import DEFAULT_SHARD_BYTES
from sedd_scale.interop.sedd_directory import write_published_files


def convert(
    source_format: str,
    target_format: str,
    source: str | Path,
    target: str | Path,
    *,
    weights: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_parameters: int | None = None,
    assumptions: Assumptions | None = None,
    results: Sequence[Path] = (),
) -> None:
    """Write the checkpoint `source` to `target`, with memory of the largest tensor, a few times.

    Args:
        source_format: one of `FORMATS`.
        target_format: one of `TARGETS`; native and sedd-train take everything that the source has.
        target: the directory to make; sedd-train may also be one file that ends in .pth or .pt.
        weights: "ema" or "master": these alone, as of a run yet to begin; None: everything.
        shard_bytes: largest size of one file's tensors, of sedd-hf, hf and hf-causal.
        extra_parameters: as `write_reference_training`.
        assumptions: what a source of another program does not say.
        results: of sedd-hf and hf, reports of sedd-scale eval_ppl for the model card.

    Raises:
        CheckpointError: no such conversion, an unusable source, a format that cannot express the
            model, or a target that exists. Nothing is left at the target.
    """
    if target_format not in TARGETS:
        raise CheckpointError(
            f"there is no conversion from {source_format} to {target_format}: {target_format} is "
            f"read only; --to takes {', '.join(TARGETS)}"
        )
    source, target = Path(source), Path(target)
    refuse_existing_output(target, "", CheckpointError)
    temporary = target.with_name(target.name + ".tmp")
    if temporary.exists():
        raise CheckpointError(
            f"{temporary} is in the way, left by another conversion: wait for it or remove it"
        )
    opened = open_checkpoint(source, format=source_format, assumptions=assumptions)
    held = opened if weights is None else WeightsOnly(opened, weights)
    card = partial(_card, opened, source, target.name, weights or "ema", results, target_format)

    def training_file() -> None:
        file = temporary
        if target.suffix not in (".pth", ".pt"):
            temporary.mkdir()
            file = temporary / TRAINING_FILE
        write_reference_training(file, held, extra_parameters=extra_parameters)

    writers: dict[str, Callable[[], None]] = {
        "native": lambda: write_native_run(held, temporary),
        "sedd-hf": lambda: write_published_files(temporary, held, card, shard_bytes=shard_bytes),
        "sedd-train": training_file,
        "hf": lambda: write_exported(temporary, held, card, shard_bytes=shard_bytes),
        "hf-causal": lambda: write_huggingface(temporary, held, shard_bytes=shard_bytes),
    }
    _write_beside(temporary, target, writers[target_format])


def _card(
    opened: CheckpointSource,
    source: Path,
    name: str,
    weights: str,
    results: Sequence[Path],
    target_format: str,
) -> str:
    """The model card of an export; with the run's validation if the averages are exported."""
    measured = []
    if opened.format == "native" and weights == "ema":
        # A step-N lies in RUN/checkpoints.
        validation = last_validation(opened.path.parent.parent, opened.described.step)
        measured += [] if validation is None else [validation]
    if results:
        fingerprint = checkpoint_fingerprint(source)
        measured += [
            read_report(path, fingerprint=fingerprint, weights=weights) for path in results
        ]
    for_transformers = target_format == "hf"
    return model_card(name, opened.described, measured, for_transformers=for_transformers)


def _write_beside(temporary: Path, target: Path, write: Callable[[], None]) -> None:
    try:
        write()
        temporary.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
