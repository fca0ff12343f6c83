"""Train and evaluate all runs of an experiment, each in processes of its own, and gather them.

Started again after an interruption, it continues: finished runs keep their result, an unfinished
one resumes from its checkpoint.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sedd_scale.config import Config, load_config
from sedd_scale.data.shards import Dataset
from sedd_scale.errors import ConfigError, TrainingError
from sedd_scale.experiments.experiment import STARTS_FROM, Experiment
from sedd_scale.files.atomic import write_atomically
from sedd_scale.files.folder_lock import lock_folder
from sedd_scale.files.identity import refuse_another
from sedd_scale.files.package import command, environment_for
from sedd_scale.preparation.documents import DocumentStream
from sedd_scale.preparation.prepare import prepare

# What the dataset was made of.
ORIGIN = "data.json"
# Of a run: its configuration, and what it came to.
CONFIG = "experiment.yaml"
RESULT = "result.json"
# Of a run: what it trained.
RUN = "run"
# How long each attempt at the training took, and since when the present one runs.
SECONDS, BEGUN = "train_seconds", "train_begun"
# How long to wait for a run that was asked to stop.
_PATIENCE = 60.0


def run_experiment(experiment: Experiment, data: Path, output: Path) -> list[dict[str, Any]]:
    """Make what is missing of an experiment in `output`: the result of every run.

    Args:
        data: a dataset's directory, a file of text, or a pattern of such files.

    Raises:
        ConfigError, DataError: no such text; a dataset of another block length or tokenizer; the
            output is in use, or holds the runs of another experiment.
        TrainingError: a run failed; names its log.
    """
    with lock_folder(output, option="--output"):
        dataset = find_dataset(experiment, data, output)
        return _Runs(experiment, dataset, output).results()


def find_dataset(experiment: Experiment, source: Path, output: Path) -> Path:
    """The prepared dataset that `source` is, or that is made of it, in `output`/data.

    Raises:
        ConfigError, DataError: as `run_experiment`.
    """
    wanted = experiment.data
    if not (source / "index.json").is_file():
        made, origin = output / "data", output / ORIGIN
        settings = {**_text_of(source), **vars(wanted)}
        if not (made / "index.json").is_file():
            prepare(
                [str(source)],
                output=made,
                block_length=wanted.block_length,
                tokenizer=wanted.tokenizer,
                valid_fraction=wanted.valid_fraction,
                vocab_size=wanted.vocab_size,
            )
            write_atomically(origin, (json.dumps(settings, indent=1) + "\n").encode())
        before = json.loads(origin.read_text()) if origin.is_file() else settings
        refuse_another(
            {key: before.get(key) for key in settings},
            settings,
            holds=f"{made} holds a dataset made",
            remedy=f"give another --output, or --data {made} for the dataset as it is",
        )
        source = made
    found = Dataset(source).index
    for key, here, there in (
        ("block_length", found["block_length"], wanted.block_length),
        ("tokenizer", found["tokenizer"]["kind"], wanted.tokenizer),
    ):
        if here != there:
            raise ConfigError(
                f"--data {source} has {key} {here}, but the experiment data.{key}={there}: change "
                "it or prepare the data again"
            )
    return source


def _text_of(source: Path) -> dict[str, Any]:
    """Which text it is: where, how much, and when it was last changed."""
    files = DocumentStream([str(source)]).identity()
    return {
        "text": os.path.abspath(source),
        "bytes": sum(int(size) for _, size, _ in files),
        "time": max((int(nanoseconds) // 10**9 for _, _, nanoseconds in files), default=0),
    }


class _Runs:
    """The runs of an experiment, in `output`/runs."""

    def __init__(self, experiment: Experiment, dataset: Path, output: Path) -> None:
        self.experiment, self.dataset, self.output = experiment, dataset, output
        self._fingerprint = Dataset(dataset).fingerprint
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def results(self) -> list[dict[str, Any]]:
        """The result of every run: those that are missing are made, `jobs` at a time."""
        # Seed after seed: stopped early, the first seeds can be reported with --seeds.
        runs = [(name, seed) for seed in self.experiment.seeds for name in self.experiment.variants]
        for name, seed in runs:  # refused before any of them starts
            self._finished(name, seed)
            self._check_begun(name, seed)
        with _exit_on_sigterm(), ThreadPoolExecutor(max_workers=self.experiment.jobs) as pool:
            futures: dict[tuple[str, int], Future[dict[str, Any]]] = {}
            for name, seed in runs:  # what a run starts from is submitted before it
                start = futures.get((self.experiment.starts.get(name, ""), seed))
                futures[name, seed] = pool.submit(self._run, name, seed, start)
            try:
                return [future.result() for future in futures.values()]
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _run(self, name: str, seed: int, start: Future[dict[str, Any]] | None) -> dict[str, Any]:
        if start is not None:
            start.result()
        finished = self._finished(name, seed)
        if finished is not None:
            return finished
        if self._stopping:
            raise TrainingError("stopped")
        folder = self._folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, self._config(name, seed).to_yaml().encode())
        _say(f"{name}, seed {seed}: training")
        run = folder / RUN
        with _timed(folder, run / "metrics.jsonl"):
            self._call(folder, ["train", str(folder / CONFIG), "--run-dir", str(run)], "train")
        # Of a run that was stopped and went on, all parts.
        train_seconds = sum(map(float, (folder / SECONDS).read_text().split()))
        settings = self.experiment.evaluation
        command = ["eval_ppl", "--checkpoint", str(run), "--data", str(self.dataset), "--json"]
        command += ["--max-blocks", str(settings.max_blocks)]
        command += ["--batch-size", str(settings.batch_size)]
        if self.experiment.variants[name].training.objective != "autoregressive":
            command += ["--draws", str(settings.draws)]
        printed = self._call(folder, command, "evaluate")
        result = {
            "variant": name,
            "seed": seed,
            "train_seconds": train_seconds,
            "identity": self._identity(name, seed),
            "evaluation": json.loads(printed.strip().splitlines()[-1]),
        }
        write_atomically(folder / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        bits = result["evaluation"]["bits_per_char"]
        _say(f"{name}, seed {seed}: {bits:.4f} bits/char after {train_seconds:.0f} s")
        return result

    def _folder(self, name: str, seed: int) -> Path:
        return self.output / "runs" / f"{name}-{seed}"

    def _config(self, name: str, seed: int) -> Config:
        settings = [f"data.path={self.dataset}", f"training.seed={seed}"]
        if name in self.experiment.starts:
            start = self._folder(self.experiment.starts[name], seed) / RUN
            settings.append(f"model.init_from={start}")
        return self.experiment.variants[name].override(*settings)

    def _anywhere(self, name: str, config: Config) -> Config:
        """A run's configuration without the places of its dataset and its start, which may move."""
        start = ["model.init_from=null"] if name in self.experiment.starts else []
        return config.override("data.path=null", *start)

    def _identity(self, name: str, seed: int) -> dict[str, Any]:
        """What a finished run's result depends on."""
        identity = {
            "config": self._anywhere(name, self._config(name, seed)).to_dict(),
            "dataset": self._fingerprint,
            "evaluation": vars(self.experiment.evaluation),
        }
        if name in self.experiment.starts:
            identity[STARTS_FROM] = self._identity(self.experiment.starts[name], seed)
        return identity

    def _finished(self, name: str, seed: int) -> dict[str, Any] | None:
        path = self._folder(name, seed) / RESULT
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        if result["identity"] != json.loads(json.dumps(self._identity(name, seed))):
            raise _another_configuration(path.parent)
        return result

    def _check_begun(self, name: str, seed: int) -> None:
        """Refuse to resume a run that was begun with another configuration."""
        path = self._folder(name, seed) / CONFIG
        if not path.is_file():
            return
        begun, wanted = load_config(path), self._config(name, seed)
        if self._anywhere(name, begun) != self._anywhere(name, wanted):
            raise _another_configuration(path.parent)

    def _call(self, folder: Path, arguments: list[str], what: str) -> str:
        """Run one of the commands; its standard output."""
        environment = environment_for(os.environ)
        if self.experiment.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.experiment.threads)
        log = folder / f"{what}.log"
        words = [*command(arguments[0]), *arguments[1:]]
        with log.open("wb") as errors:
            with self._lock:
                if self._stopping:
                    raise TrainingError("stopped")
                child = subprocess.Popen(
                    words, env=environment, stdout=subprocess.PIPE, stderr=errors
                )
                self._children.add(child)
            printed, _ = child.communicate()
            complaints = log.read_text(errors="replace").strip().splitlines()
            errors.write(printed)
        with self._lock:
            self._children.discard(child)
        if child.returncode:
            why = complaints[-1] if complaints else "nothing was said"
            raise TrainingError(
                f"{what} of {folder.name} ended with code {child.returncode}: {why} (see {log})"
            )
        return printed.decode(errors="replace")

    def _stop(self) -> None:
        with self._lock:
            self._stopping = True
            children = list(self._children)
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()


def _another_configuration(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} holds a run of another configuration: give another --output, or remove it"
    )


@contextlib.contextmanager
def _timed(folder: Path, metrics: Path) -> Iterator[None]:
    """Note what an attempt takes; of one that was killed, until it last wrote its metrics."""
    begun = folder / BEGUN

    def note(seconds: float) -> None:
        with (folder / SECONDS).open("a") as stream:
            stream.write(f"{max(0.0, seconds):.1f}\n")

    if begun.is_file() and metrics.is_file():
        note(metrics.stat().st_mtime - begun.stat().st_mtime)
    begun.write_text("")
    started = time.perf_counter()
    try:
        yield
    finally:
        note(time.perf_counter() - started)
        begun.unlink()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack: by default the children would train on, nobody's."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
