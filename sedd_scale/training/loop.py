"""The training loop: batch, corrupt, step, guard, log, validate, save.

    torchrun --nproc-per-node 2 -m sedd_scale train configs/runs/tiny.yaml --run-dir runs/first \\
        data.path=data/books parallel.tensor=2
"""

import functools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sedd_scale.checkpoint.writer import CheckpointWriter
from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.data.prefetcher import Prefetcher
from sedd_scale.diffusion.graphs import make_graph
from sedd_scale.engine.engine import Engine, make_engine
from sedd_scale.errors import ConfigError
from sedd_scale.interop.adapted_tokenizer import fits
from sedd_scale.interop.initial_weights import open_initial_weights
from sedd_scale.model.network import layer_builders
from sedd_scale.parallel.layout import Layout, initialize_layout, launched_world_size
from sedd_scale.tracking.metrics import MetricsLog
from sedd_scale.tracking.utilisation import Utilisation
from sedd_scale.training.bad_steps import BadSteps, stopped_at
from sedd_scale.training.batches import TrainBatches, ValidationBatches
from sedd_scale.training.calibration import calibrate_head
from sedd_scale.training.guards import StepGuard
from sedd_scale.training.learning_rate import learning_rate, unreached_rate
from sedd_scale.training.lost_ranks import lost_ranks_in_one_line
from sedd_scale.training.optimizer import make_optimizer
from sedd_scale.training.replicas import check_replicas
from sedd_scale.training.resume import Start, find_resume, load_state
from sedd_scale.training.run_lock import RunLock
from sedd_scale.training.signals import StopSignals
from sedd_scale.training.watchdog import Watchdog
from sedd_scale.version import now, versions


def train(config: Config, run_dir: Path, stop: StopSignals | None = None) -> bool:
    """Train as configured; every process of the job calls this.

    Returns whether the run is finished: not, when it stopped and saved at a signal to any rank.

    Everything that can be refused is refused before a process group starts.

    Raises:
        ConfigError, DataError, CheckpointError: the configuration, the dataset or the checkpoint
            to resume or to start from does not fit; another job trains in the directory.
        TrainingError: a loss or gradient that is not finite, or too many updates left out in a
            row, or replicas that are not the same.
        LostRankError: another process ended or cannot be reached.
    """
    stop = stop or StopSignals()
    config, corpus = open_dataset(config)
    source = find_resume(config, run_dir, corpus)
    initial = open_initial_weights(config, corpus) if source is None else None
    engine = build(config, corpus)
    layout = engine.layout
    lock = RunLock(run_dir, layout)
    start = Start()
    if source is not None:
        start = load_state(config, run_dir, source, corpus, engine)
    if initial is not None:
        initial.load_into(engine)
    utilisation = None
    if layout.rank == 0:
        utilisation = Utilisation(config, layout.device, layout.world_size)
        write_run_files(config, run_dir, layout, utilisation)
    with stop.shielded():
        log = MetricsLog(
            run_dir,
            config.logging,
            is_main=layout.rank == 0,
            total_steps=config.training.steps,
            resumed_step=None if source is None else start.step,
            run_config=config.to_dict(),
            utilisation=utilisation,
        )
    for line in start.notes:
        log.warn(start.step, line)
    if start.source is not None:
        log.say(f"resumed {start.source} at step {start.step}")
    if initial is not None:
        log.say(initial.description)
    longer = None if initial is None else initial.beyond(corpus.block_length)
    for note in (unreached_rate(config), longer):
        if note is not None:
            log.say(note)
    batches = TrainBatches(corpus, config, layout, skipped=start.skipped_shards)
    if initial is not None and config.model.calibrate_head:
        log.say(f"calibrated: {calibrate_head(engine, batches):+.4f} in every bias of the head")
    validation = None
    if config.training.valid_every:
        validation = ValidationBatches(corpus, config, layout)

    guard = StepGuard(config.training, start.guard)
    bad_steps = BadSteps(
        run_dir, config, layout, fingerprint=corpus.fingerprint, resumed_step=start.step
    )
    watchdog = Watchdog(run_dir, layout.rank, config.training, first_step=start.step)

    def meta_of(step: int, tokens: int) -> dict[str, Any]:
        samples_seen = step * config.training.global_batch
        return {
            "step": step,
            "samples_seen": samples_seen,
            "tokens": tokens,
            "config": config.to_dict(),
            "guard": guard.state(),
            **corpus.describe_position(batches.loader, samples_seen),
        }

    writer = CheckpointWriter(
        run_dir,
        engine.fragments,
        config=config.checkpoint,
        tokenizer_directory=corpus.tokenizer_directory,
        say=log.say,
        saved=log.saved,
    )
    last_step = config.training.steps
    tokens = start.tokens
    logged_step, logged_tokens, logged_at = start.step, tokens, time.perf_counter()
    stopped = False
    with stop.shielded():
        prefetcher = Prefetcher(batches.of_step, start.step, end_step=last_step)
    stop.arm()
    with (
        lock,
        log,
        writer,
        lost_ranks_in_one_line(watchdog.where),
        prefetcher as prefetched,
        watchdog,
    ):
        for step, batch in enumerate(prefetched, start=start.step + 1):
            lr = learning_rate(step - 1, config.optimizer, last_step)
            numbers, _ = guard.train_step(
                engine, step, batch.micro_batches, lr=lr, wants_stop=stop.wants_stop
            )
            watchdog.step_done(step)
            tokens += batch.tokens
            log.advance(step)
            verdict, must_stop = guard.verdict, guard.must_stop()
            if verdict.cause is not None:
                action = "reported" if verdict.applied else "skipped"
                line = bad_steps.record(
                    step,
                    numbers,
                    verdict,
                    batch.micro_batches,
                    action="stopped" if must_stop else action,
                )
                log.say(line)
            if must_stop:
                raise stopped_at(step, numbers, must_stop, guard, engine, batch.micro_batches)
            if _due(step, config.training.check_replicas_every):
                check_replicas(step, engine.fragments)
            stopped = numbers.wants_stop and step < last_step
            if step == last_step or _due(step, config.logging.every):
                seconds = time.perf_counter() - logged_at
                values = {
                    "loss": numbers.loss,
                    "grad_norm": numbers.grad_norm,
                    "lr": lr,
                    "tokens": tokens,
                    "tokens_per_second": (tokens - logged_tokens) / seconds,
                    "step_ms": 1000 * seconds / (step - logged_step),
                    "loss_z": verdict.loss_z,
                    "grad_norm_z": verdict.grad_norm_z,
                    "skipped_steps": guard.skipped,
                }
                data = batches.metrics(step * config.training.global_batch)
                log.training(step, values, data=data)
                logged_step, logged_tokens, logged_at = step, tokens, time.perf_counter()
            paused_at = time.perf_counter()
            if validation is not None and (
                step == last_step or _due(step, config.training.valid_every)
            ):
                with watchdog.slow("a validation"):
                    nats_per_token, stderr = validate(engine, validation)
                log.validation(
                    step, nats_per_token=nats_per_token, stderr=stderr, data=validation.metrics()
                )
            if stopped or step == last_step or _due(step, config.checkpoint.every):
                with watchdog.slow("a save"):
                    writer.save(meta_of(step, tokens))
            writer.poll()
            logged_at += time.perf_counter() - paused_at
            if stopped:
                with watchdog.slow("a save"):
                    writer.wait()
                log.say(f"stopped by a signal at step {step}: saved; start again to go on")
                break
    return not stopped


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def build(config: Config, corpus: Corpus) -> Engine:
    """This process's part of the network in its engine.

    Starts the process groups; the configuration is one of `open_dataset`.
    """
    layout = initialize_layout(
        **config.parallel.axes,
        sequence_parallel=config.parallel.sequence_parallel,
        # The watchdog comes first: it says what it waited for.
        timeout_seconds=config.training.hang_slow + 600,
    )
    graph = make_graph(config.graph.name, corpus.vocab_size)
    builders = layer_builders(config, graph, layout)
    return make_engine(builders, layout, config, functools.partial(make_optimizer, config))


def open_dataset(config: Config) -> tuple[Config, Corpus]:
    """Open the dataset, or those of the mixture, and fill in what the configuration leaves to it.

    Raises:
        ConfigError: N or L given and not the dataset's, or an illegal combination with them.
        DataError: no dataset there, or a damaged one; a missing tokenizer; a training set smaller
            than a batch, or one without validation blocks where they are needed.
    """
    config.validate()
    corpus = Corpus(config.data)
    given = config.model.vocab_size
    if given is not None and config.model.init_from is not None and fits(corpus.vocab_size, given):
        corpus.vocab_size = given  # ids that no text has, as of the model begun with
    for key, given, found in (
        ("model.vocab_size", config.model.vocab_size, corpus.vocab_size),
        ("data.block_length", config.data.block_length, corpus.block_length),
    ):
        if given not in (None, found):
            raise ConfigError(
                f"{key}={given} does not fit {corpus.location}, which has {found}: set "
                f"{key}={found} or null, or prepare the data again"
            )
    config = config.override(
        f"model.vocab_size={corpus.vocab_size}", f"data.block_length={corpus.block_length}"
    )
    config.validate(launched_world_size())
    corpus.check_use(config)
    return config, corpus


def validate(engine: Engine, validation: ValidationBatches) -> tuple[float, float]:
    """The bound of the averaged weights on the validation blocks and its standard error."""
    with engine.fragments.ema_weights():
        nats = engine.evaluate(validation.micro_batches)
    nats = nats.to(engine.layout.device)
    nats_of_ranks = [torch.empty_like(nats) for _ in range(engine.layout.data)]
    dist.all_gather(nats_of_ranks, nats, group=engine.layout.data_group)
    return validation.bound([part.cpu() for part in nats_of_ranks])


def write_run_files(
    config: Config, run_dir: Path, layout: Layout, utilisation: Utilisation
) -> None:
    """Write the resolved configuration and the environment into the run directory."""
    (run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    environment: dict[str, Any] = {
        "command": sys.argv,
        "platform": platform.platform(),
        "processes": layout.world_size,
        "device": (
            torch.cuda.get_device_name() if layout.device.type == "cuda" else platform.machine()
        ),
        "peak_flops_per_second": utilisation.peak.flops_per_second,
        "peak": utilisation.peak.name,
        "versions": versions(),
        "started": now(),
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
