"""A recorded bad step once more, looked at closely: `sedd-scale train --replay STEP`.

Batches and noise are functions of the seed and the step, so the newest good checkpoint before the
step is enough: the steps between are made again in memory, each update made or skipped as it was
then, and the bad step is run without its update. Under the layout of the run its numbers come out
bit for bit. Nothing is written into the run directory.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sedd_scale.checkpoint.directory import saved_steps
from sedd_scale.checkpoint.reading import load_checkpoint
from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.engine.engine import Engine, MicroBatch
from sedd_scale.engine.update_gate import StepNumbers
from sedd_scale.errors import CheckpointError, ConfigError, DamagedCheckpointError, DataError
from sedd_scale.files.json_lines import read_json_lines
from sedd_scale.interop.initial_weights import open_initial_weights
from sedd_scale.parallel.agreement import gathered
from sedd_scale.training.bad_steps import FILE_NAME, batch_fingerprint
from sedd_scale.training.batches import TrainBatches
from sedd_scale.training.guards import StepGuard
from sedd_scale.training.learning_rate import learning_rate
from sedd_scale.training.loop import build, open_dataset
from sedd_scale.training.resume import Start, check_resume

# Sequences named of each rank, those with the highest loss.
NAMED = 3
# Relative difference up to which another layout's numbers count as the same.
SAME = 1e-4


class _OfRank(NamedTuple):
    """What one data-parallel rank found in its part of the batch."""

    rank: int
    loss: float
    worst: list[tuple[float, int]]
    """Nats per token and sample of its worst sequences, worst first."""


def replay(config: Config, run_dir: Path, step: int) -> Iterator[str]:
    """Run a step of bad_steps.jsonl again; collective over all processes.

    Yields:
        The report line by line, on rank 0; nothing on the others.

    Raises:
        ConfigError: no such step is recorded.
        DataError: the dataset is not the one that the step was recorded with.
        CheckpointError: no checkpoint before the step can be loaded.
    """
    record = recorded(run_dir, step)
    config, corpus = open_dataset(config)
    if corpus.fingerprint != record["dataset_fingerprint"]:
        raise DataError(
            f"{corpus.location} is not what step {step} of {run_dir} was recorded with: its "
            f"fingerprint is {corpus.fingerprint}, not {record['dataset_fingerprint']}"
        )
    engine = build(config, corpus)
    layout = engine.layout
    start = _load_before(step, config, run_dir, corpus, engine)
    batches = TrainBatches(corpus, config, layout, skipped=start.skipped_shards)
    guard = StepGuard(config.training, start.guard)
    for number in range(start.step + 1, step):
        guard.train_step(
            engine,
            number,
            batches.of_step(number - 1).micro_batches,
            lr=learning_rate(number - 1, config.optimizer, config.training.steps),
        )
    micro_batches = batches.of_step(step - 1).micro_batches

    def judge_only(numbers: StepNumbers) -> bool:
        guard.accepts(step, numbers)
        return False

    numbers = engine.train_step(micro_batches, lr=0.0, accept=judge_only).numbers
    loss_of_replica = engine.loss_of_replica()
    fingerprint = batch_fingerprint(micro_batches, layout)
    diagnosis = guard.explain() if numbers.finite else engine.explain(micro_batches)
    mine = _of_rank(config, corpus, engine, micro_batches, step, loss_of_replica)
    of_ranks = gathered(mine)
    if layout.rank != 0:
        return
    yield (
        f"step {step} of {run_dir}, recorded as {record['action']} ({record['cause']}), from "
        f"{start.source or 'the initial weights'}"
        + (f"; steps {start.step + 1} to {step - 1} made again" if step > start.step + 1 else "")
    )
    yield f"batch: samples {record['first_sample']}-{record['last_sample']}, {fingerprint}, " + (
        "as recorded"
        if fingerprint == record["batch_fingerprint"]
        else f"not the {record['batch_fingerprint']} that was recorded: the configuration, the "
        "code or the data has changed"
    )
    for name, value in (("loss", numbers.loss), ("grad_norm", numbers.grad_norm)):
        yield f"{name.replace('grad_norm', 'gradient norm')}: {_compared(value, record[name])}"
    for found in of_ranks:
        if found is not None:
            worst = ", ".join(f"{sample} ({nats:.4g})" for nats, sample in found.worst)
            yield f"rank {found.rank}: loss {found.loss:.6g}; highest, nats/token: samples {worst}"
    yield f"diagnosis: {diagnosis}"


def recorded(run_dir: Path, step: int) -> dict[str, Any]:
    """The step's line of bad_steps.jsonl.

    Raises:
        ConfigError: there is none.
    """
    path = run_dir / FILE_NAME
    records: dict[int, dict[str, Any]] = {
        record["step"]: record for record in read_json_lines(path)
    }
    if step not in records:
        there = ", ".join(map(str, sorted(records)[-10:])) or "none"
        raise ConfigError(f"--replay {step}: {path} records no such step; recorded are: {there}")
    return records[step]


def _load_before(step: int, config: Config, run_dir: Path, corpus: Corpus, engine: Engine) -> Start:
    """Load the newest good checkpoint before the step; without one, start as the run did."""
    folder = run_dir / "checkpoints"
    candidates = [saved for saved in saved_steps(folder) if saved < step]
    check = functools.partial(check_resume, config, corpus)
    for saved in reversed(candidates):
        path = folder / f"step-{saved}"
        try:
            meta = load_checkpoint(
                path, engine.fragments, verify=config.checkpoint.verify, check=check
            )
        except DamagedCheckpointError:
            continue
        return Start.at(path, meta)
    if candidates:
        raise CheckpointError(
            f"--replay {step}: no good checkpoint before that step in {folder}: restore one"
        )
    initial = open_initial_weights(config, corpus)
    if initial is not None:
        initial.load_into(engine)
    return Start()


def _of_rank(
    config: Config,
    corpus: Corpus,
    engine: Engine,
    micro_batches: list[MicroBatch],
    step: int,
    loss: float | None,
) -> _OfRank | None:
    """Collective over a replica's ranks; None on those that do not speak for theirs."""
    nats_B = engine.evaluate(micro_batches) / corpus.block_length
    if loss is None:
        return None
    batch, layout = config.training.global_batch, engine.layout
    first = (step - 1) * batch + layout.data_rank * (batch // layout.data)
    pairs = [(float(nats), first + index) for index, nats in enumerate(nats_B)]
    # What is not a number is worst.
    pairs.sort(key=lambda pair: (not math.isnan(pair[0]), -pair[0]))
    return _OfRank(layout.rank, loss, pairs[:NAMED])


def _compared(value: float, before: float | None) -> str:
    """A number beside the recorded one; None is what JSON holds of one that is not finite."""
    if before is None:
        same = not math.isfinite(value)
        return f"{value:.6g}, " + ("as recorded" if same else "recorded: not finite")
    if value == before:
        return f"{value:.6g}, as recorded, bit for bit"
    near = math.isfinite(value) and abs(value - before) <= SAME * abs(before)
    return f"{value:.6g}, " + (
        f"as recorded within {SAME:g}" if near else f"recorded: {before:.6g}"
    )
