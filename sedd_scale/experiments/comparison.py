"""Train and evaluate all runs of an experiment, each in processes of its own, and gather them.

Started again after an interruption it goes on: finished runs keep their result, an unfinished one
resumes from its checkpoint.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sedd_scale.config import Config
from sedd_scale.errors import ConfigError, TrainingError
from sedd_scale.experiments.experiment import Experiment

RESULT = "result.json"
# How long each attempt at the training took.
SECONDS = "train_seconds"
# How long to wait for a run that was asked to stop.
_PATIENCE = 60.0


def find_dataset(experiment: Experiment, source: Path, output: Path) -> Path:
    """The prepared dataset that `source` is, or that is made of it, in `output`/data.

    Args:
        source: a dataset's directory, a file of text, or a pattern of such files.

    Raises:
        ConfigError, DataError: no such text, or a dataset of another block length.
    """
    from sedd_scale.data.prepare import prepare
    from sedd_scale.data.shards import Dataset

    wanted = experiment.data
    if not (source / "index.json").is_file():
        made = output / "data"
        if not (made / "index.json").is_file():
            prepare(
                [str(source)],
                output=made,
                block_length=wanted.block_length,
                tokenizer=wanted.tokenizer,
                valid_fraction=wanted.valid_fraction,
                vocab_size=wanted.vocab_size,
            )
        source = made
    found = Dataset(source).block_length
    if found != wanted.block_length:
        raise ConfigError(
            f"--data {source} has blocks of {found} tokens, but data.block_length="
            f"{wanted.block_length}: change it or prepare the data again"
        )
    return source


class Comparison:
    """The runs of an experiment in `output`/runs.

    Args:
        tools: the folder of train.py and eval_ppl.py.
        say: told of each run that begins or ends.
    """

    def __init__(
        self,
        experiment: Experiment,
        dataset: Path,
        output: Path,
        tools: Path,
        say: Callable[[str], None],
    ) -> None:
        self.experiment, self.dataset, self.output = experiment, dataset, output
        self.tools, self.say = tools, say
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def results(self) -> list[dict[str, Any]]:
        """The result of every run: those that are missing are made, `jobs` at a time.

        Raises:
            ConfigError: the output holds a run of another configuration.
            TrainingError: a run failed; names its log.
        """
        # Seed after seed: stopped early, the first seeds can be reported with --seeds.
        runs = [(name, seed) for seed in self.experiment.seeds for name in self.experiment.variants]
        for name, seed in runs:  # refused before any of them starts
            self._finished(name, seed)
        with _exit_on_sigterm(), ThreadPoolExecutor(max_workers=self.experiment.jobs) as pool:
            futures = [pool.submit(self._run, name, seed) for name, seed in runs]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _run(self, name: str, seed: int) -> dict[str, Any]:
        finished = self._finished(name, seed)
        if finished is not None:
            return finished
        folder = self._folder(name, seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experiment.yaml").write_text(self._config(name, seed).to_yaml())
        self.say(f"{name}, seed {seed}: training")
        run = folder / "run"
        started = time.perf_counter()
        try:
            self._call(
                folder,
                ["train.py", str(folder / "experiment.yaml"), "--run-dir", str(run)],
                "train",
            )
        finally:
            with (folder / SECONDS).open("a") as stream:
                stream.write(f"{time.perf_counter() - started:.1f}\n")
        # Of a run that was stopped and went on, all parts.
        train_seconds = sum(map(float, (folder / SECONDS).read_text().split()))
        settings = self.experiment.evaluation
        command = ["eval_ppl.py", "--checkpoint", str(run), "--data", str(self.dataset), "--json"]
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
        temporary = folder / f"{RESULT}.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(folder / RESULT)
        bits = result["evaluation"]["bits_per_char"]
        self.say(f"{name}, seed {seed}: {bits:.4f} bits/char after {train_seconds:.0f} s")
        return result

    def _folder(self, name: str, seed: int) -> Path:
        return self.output / "runs" / f"{name}-{seed}"

    def _config(self, name: str, seed: int) -> Config:
        return self.experiment.variants[name].override(
            f"data.path={self.dataset}", f"training.seed={seed}"
        )

    def _identity(self, name: str, seed: int) -> dict[str, Any]:
        """What a finished run's result depends on."""
        return {
            "config": self._config(name, seed).to_dict(),
            "evaluation": vars(self.experiment.evaluation),
        }

    def _finished(self, name: str, seed: int) -> dict[str, Any] | None:
        path = self._folder(name, seed) / RESULT
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        if result["identity"] != json.loads(json.dumps(self._identity(name, seed))):
            raise ConfigError(
                f"{path.parent} holds a run of another configuration: give another --output, or "
                "remove it"
            )
        return result

    def _call(self, folder: Path, arguments: list[str], what: str) -> str:
        """Run one of the tools; its standard output."""
        environment = dict(os.environ)
        if self.experiment.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.experiment.threads)
        log = folder / f"{what}.log"
        command = [sys.executable, str(self.tools / arguments[0]), *arguments[1:]]
        with log.open("wb") as errors:
            with self._lock:
                if self._stopping:
                    raise TrainingError("stopped")
                child = subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=errors
                )
                self._children.add(child)
            printed, _ = child.communicate()
            errors.write(printed)
        with self._lock:
            self._children.discard(child)
        if child.returncode:
            lines = log.read_text(errors="replace").strip().splitlines() or ["nothing was said"]
            raise TrainingError(
                f"{what} of {folder.name} ended with code {child.returncode}: {lines[-1]} "
                f"(see {log})"
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


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack: by default the children would train on, nobody's."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
