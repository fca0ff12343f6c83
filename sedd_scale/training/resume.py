"""Where a run resumes: at which checkpoint, whether it fits, and its state in the engine."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_scale.checkpoint.directory import (
    find_checkpoint,
    has_checkpoint,
    newest_whole,
    read_meta,
    run_of,
)
from sedd_scale.checkpoint.reading import load_checkpoint, load_newest
from sedd_scale.config import Config, config_from_dict
from sedd_scale.config.sections import ORDER, TASK
from sedd_scale.config.yaml_text import scalar_text
from sedd_scale.data.corpus import Corpus
from sedd_scale.engine.engine import Engine
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.interop.initial_weights import check_same_model


@dataclass(frozen=True)
class Start:
    """Where a run starts: at its first step, or at a checkpoint's.

    Attributes:
        source: the checkpoint's directory; None for a fresh run.
        step: updates made.
        tokens: of text seen.
        guard: the state of the step guard; None for a fresh run.
        skipped_shards: (dataset, shard, step from which it is skipped) of damaged ones.
        notes: a line on each checkpoint that was passed over.
    """

    source: Path | None = None
    step: int = 0
    tokens: int = 0
    guard: dict[str, Any] | None = None
    skipped_shards: Sequence[Sequence[int]] = ()
    notes: Sequence[str] = ()

    @classmethod
    def at(cls, source: Path, meta: Mapping[str, Any], notes: Sequence[str] = ()) -> "Start":
        """At a checkpoint that says this of itself."""
        skipped = meta.get("skipped_shards", ())
        return cls(source, meta["step"], meta["tokens"], meta.get("guard"), skipped, notes)


def find_resume(config: Config, run_dir: Path, corpus: Corpus) -> Path | None:
    """Where to resume, a run directory or one checkpoint, or None for a new run.

    What can be refused without reading a whole checkpoint is refused here; `load_state` finds the
    newest good one.

    Raises:
        CheckpointError: none where one is expected, or one of another run's data, batch or seed.
        ConfigError: a new run is asked for where one already is.
    """
    if run_of(run_dir) != run_dir:
        raise ConfigError(
            f"--run-dir {run_dir} is within the run {run_of(run_dir)}: give that; "
            "training.resume names one of its checkpoints"
        )
    resume = config.training.resume
    if resume == "never" or (resume == "auto" and not has_checkpoint(run_dir)):
        if has_checkpoint(run_dir):
            raise ConfigError(
                f"training.resume=never, but {run_dir} already holds checkpoints: give another "
                "--run-dir, or training.resume=auto to go on with that run"
            )
        return None
    if resume == "auto":
        source, meta, _ = newest_whole(run_dir)
        check_resume(config, corpus, source, meta)
        return run_dir
    source = find_checkpoint(Path(resume))
    check_resume(config, corpus, source, read_meta(source))
    return source


def load_state(
    config: Config, run_dir: Path, source: Path, corpus: Corpus, engine: Engine
) -> Start:
    """Load what `find_resume` found into the engine.

    Raises:
        CheckpointError: as `load_checkpoint` for a checkpoint given by its path; as `load_newest`
            for the run directory.
    """
    check = functools.partial(check_resume, config, corpus)
    verify = config.checkpoint.verify
    passed_over: list[str] = []
    if source == run_dir:
        say = passed_over.append
        source, meta = load_newest(run_dir, engine.fragments, verify=verify, check=check, say=say)
    else:
        meta = load_checkpoint(source, engine.fragments, verify=verify, check=check)
    return Start.at(source, meta, passed_over)


def check_resume(config: Config, corpus: Corpus, source: Path, meta: dict[str, Any]) -> None:
    """Refuse a checkpoint that this run cannot go on from.

    Raises:
        CheckpointError: it is of another run's data, batch, seed, objective or noise, or of another
            program and without its optimizer's state.
        ConfigError: it has more steps than the run, or is of another network.
    """
    if meta["step"] > config.training.steps:
        raise ConfigError(
            f"{source} has done {meta['step']} steps, more than "
            f"training.steps={config.training.steps}: raise training.steps"
        )
    saved = config_from_dict(meta["config"])
    if meta["dataset_fingerprint"] is None:
        _check_imported(config, source, meta, saved)
        return
    corpus.check_position(source, meta, config)
    for key, field, now in config.all_keys():
        before, kind = saved.value(key), field.metadata["shared"]
        if kind in (ORDER, TASK) and before != now:
            mend = f"set {key}={scalar_text(before)}"
            if kind == ORDER:
                mend = f"the order of its data depends on it; {mend}"
            else:
                mend += f", or begin a new run with model.init_from={source}"
            raise CheckpointError(
                f"{source} was trained with {key}={scalar_text(before)}, not {scalar_text(now)}: "
                f"{mend}"
            )
    check_same_model(config, saved, str(source))


def _check_imported(config: Config, source: Path, meta: dict[str, Any], saved: Config) -> None:
    """Refuse a converted checkpoint that another program's training cannot go on from.

    What it has seen of which data nobody knows. Its weights, averages, moments and step are all
    there is to a run besides, and the data goes on at this step of our own order.
    """
    if meta["optimizer_step"] == 0:
        raise CheckpointError(
            f"{source} was converted from weights without an optimizer's state, so there is no run "
            f"to go on with: begin a new one, with model.init_from={source} and another --run-dir"
        )
    saved = saved.override(f"model.vocab_size={meta['num_tokens']}")
    check_same_model(config, saved, str(source))
