"""What a run trains on: one dataset, or several of one tokenizer in a mixture."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from sedd_scale.config import Config, DataConfig
from sedd_scale.data.cache import FileCache
from sedd_scale.data.joint_reader import JointReader
from sedd_scale.data.loader import TrainLoader
from sedd_scale.data.mixture import MixturePlan, Stage
from sedd_scale.data.remote_sources import is_remote
from sedd_scale.data.shards import Dataset
from sedd_scale.errors import CheckpointError, ConfigError, DataError
from sedd_scale.tokenizers.base import TOKENIZER_DIRECTORY, Tokenizer

# Windows whose shards a cache has to hold: the present one and the next.
CACHED_WINDOWS = 2


class Corpus:
    """The datasets of a configuration, opened and checked against each other.

    Attributes:
        datasets: in the order of the configuration.
        block_length: L; vocab_size: N; eos_id; packing: the same in all of them.
        fingerprint: of the dataset, or of all of them together.
        location: what errors call it.

    Raises:
        ConfigError: the configuration names no dataset, or one twice.
        DataError: a dataset is missing or damaged, or does not fit the others.
    """

    def __init__(self, config: DataConfig) -> None:
        locations = locations_of(config)
        cache = None
        if any(map(is_remote, locations)):
            cache = FileCache(cache_directory(config), int(config.cache_gb * 1e9))
        self.datasets = [Dataset(location, cache=cache) for location in locations]
        first = self.datasets[0]
        for other in self.datasets[1:]:
            _check_alike(first, other)
        fingerprints = [dataset.fingerprint for dataset in self.datasets]
        if len(set(fingerprints)) < len(fingerprints):
            raise ConfigError(
                f"data.mixture names one dataset twice ({', '.join(locations)}): name it once, "
                "with the sum of the weights"
            )
        self._check_sizes = config.on_bad_shard == "stop"
        self.block_length, self.vocab_size = first.block_length, first.vocab_size
        self.eos_id = first.eos_id
        self.packing: str = first.index["packing"]
        self.location = ", ".join(dataset.location for dataset in self.datasets)
        self.fingerprint = first.fingerprint
        if len(fingerprints) > 1:
            self.fingerprint = hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
        if cache is not None:
            self._check_cache(config, cache)

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer's files lie, on this machine."""
        return self.datasets[0].path / TOKENIZER_DIRECTORY

    @property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the tokenizer that made the ids."""
        return str(self.datasets[0].index["tokenizer"]["fingerprint"])

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; DataError where it is missing or another."""
        return self.datasets[0].load_tokenizer()

    def train_loader(self, config: Config) -> TrainLoader:
        """The training order of this configuration; raises DataError for a split without blocks."""
        return TrainLoader(
            [dataset.reader("train", check_sizes=self._check_sizes) for dataset in self.datasets],
            seed=config.training.seed,
            global_batch=config.training.global_batch,
            window=config.data.shuffle_window,
            plan=plan_of(config, self.block_length),
        )

    def valid_reader(self) -> JointReader:
        """The validation blocks of all datasets, one after the other."""
        return JointReader(
            [dataset.reader("valid", check_sizes=self._check_sizes) for dataset in self.datasets]
        )

    def check_use(self, config: Config) -> None:
        """Refuse, before the first step, what a run would stumble over later.

        Raises:
            ConfigError: attention or padding by documents, and EOS within documents.
            DataError: a missing tokenizer; an empty training split, or one smaller than a batch; no
                validation split where one is needed; a local shard that is missing or cut short.
        """
        tokenizer = self.load_tokenizer()
        if config.model.document_attention and tokenizer.eos_in_text:
            raise ConfigError(
                f"model.document_attention=true cannot tell the documents of {self.location}: the "
                f"EOS of its {tokenizer.kind} tokenizer also stands inside them; set it to false"
            )
        plan = plan_of(config, self.block_length)
        total = config.training.steps * config.training.global_batch
        for dataset, samples in zip(self.datasets, plan.given(total).tolist()):
            blocks = len(dataset.reader("train", check_sizes=self._check_sizes))
            if samples and blocks < config.training.global_batch:
                raise DataError(
                    f"{dataset.location} has {blocks} training blocks, fewer than "
                    f"training.global_batch={config.training.global_batch}: prepare it with more "
                    "text, or lower training.global_batch"
                )
        if config.training.valid_every:
            self.valid_reader()

    def describe_position(self, loader: TrainLoader, num_samples: int) -> dict[str, Any]:
        """What a checkpoint says of the data after the run's first samples, of plain types."""
        return {
            "dataset_fingerprint": self.fingerprint,
            "dataset_fingerprints": [dataset.fingerprint for dataset in self.datasets],
            "dataset_samples": loader.plan.given(num_samples).tolist(),
            # [dataset, shard, from which step on]
            "skipped_shards": sorted([*shard, step] for shard, step in loader.skipped.items()),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "num_tokens": self.vocab_size,
            "block_length": self.block_length,
        }

    def check_position(self, source: Path, meta: dict[str, Any], config: Config) -> None:
        """Whether a checkpoint's run resumes with this data exactly where it was.

        Datasets may be added behind those of the checkpoint, and weights may change from its step
        on, as long as the samples consumed so far stay the same.

        Raises:
            DataError: the datasets are other ones.
            CheckpointError: the mixture up to the checkpoint is another one.
        """
        before = meta.get("dataset_fingerprints", [meta["dataset_fingerprint"]])
        now = [dataset.fingerprint for dataset in self.datasets]
        if now[: len(before)] != before:
            raise DataError(
                f"{source} was trained on another dataset than {self.location} (their fingerprints "
                "differ): give the same data.path, or another --run-dir for a new run"
            )
        samples = meta["samples_seen"]
        expected = meta.get("dataset_samples", [samples])
        expected = expected + [0] * (len(now) - len(expected))
        given = plan_of(config, self.block_length).given(samples).tolist()
        if given != expected:
            raise CheckpointError(
                f"{source} took {expected} samples of the datasets of data.mixture, but this "
                f"configuration would have taken {given}: give the same weights, and change them "
                f"from step {meta['step']} on with data.stages"
            )

    def _check_cache(self, config: DataConfig, cache: FileCache) -> None:
        needed = 0
        for dataset in self.datasets:
            shards = dataset.splits["train"]["shards"]
            if dataset.is_remote and shards:
                largest = max(shard["bytes"] for shard in shards)
                fewest = max(1, min(shard["blocks"] for shard in shards[:-1] or shards))
                window = config.shuffle_window or dataset.splits["train"]["blocks"]
                per_window = -(-window // fewest) + 1
                needed += largest * min(len(shards), CACHED_WINDOWS * per_window + 1)
        if needed > cache.limit_bytes:
            raise ConfigError(
                f"data.cache_gb={config.cache_gb} does not hold the shards of two windows of "
                f"data.shuffle_window={config.shuffle_window}: set data.cache_gb above "
                f"{needed / 1e9:.3g} or lower data.shuffle_window"
            )


def locations_of(config: DataConfig) -> list[str]:
    """The datasets that a configuration names; ConfigError where it names none."""
    if config.mixture is not None:
        return [str(entry["path"]) for entry in config.mixture]
    if config.path is None:
        raise ConfigError(
            "data.path is null: prepare a dataset with sedd-scale prepare_data and give its "
            "directory as data.path=DIR"
        )
    return [config.path]


def cache_directory(config: DataConfig) -> Path:
    """Where this node keeps the files of remote datasets."""
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(tempfile.gettempdir()) / "sedd_scale_cache"


def plan_of(config: Config, block_length: int) -> MixturePlan:
    """Which dataset each sample comes from, as configured.

    Raises:
        ConfigError: weights that cannot be kept, or token budgets that end before the run.
    """
    mixture, batch = config.data.mixture, config.training.global_batch
    if mixture is None:
        return MixturePlan([Stage(0, (1.0,))])
    if "tokens" in mixture[0]:
        budget = sum(float(entry["tokens"]) for entry in mixture)
        steps = int(budget // (batch * block_length))
        if steps < config.training.steps:
            raise ConfigError(
                f"the token budgets of data.mixture, {budget:.6g} together, end before "
                f"training.steps={config.training.steps}: set training.steps={steps} or raise them"
            )
        return MixturePlan([Stage(0, tuple(float(entry["tokens"]) for entry in mixture))])
    stages = [Stage(0, tuple(float(entry["weight"]) for entry in mixture))]
    for stage in config.data.stages or []:
        stages.append(Stage(stage["step"] * batch, tuple(map(float, stage["weights"]))))
    return MixturePlan(stages)


def _check_alike(first: Dataset, other: Dataset) -> None:
    for name, one, two in (
        ("blocks of", first.block_length, other.block_length),
        ("tokenizer", first.index["tokenizer"], other.index["tokenizer"]),
        ("packing", first.index["packing"], other.index["packing"]),
    ):
        if one != two:
            raise DataError(
                f"{other.location} does not mix with {first.location}: {name} {two}, not {one}; "
                "prepare both with the same settings"
            )
