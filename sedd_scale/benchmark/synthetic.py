"""A training run on random tokens: the configuration, the batches and the engine of a benchmark."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sedd_scale.config import Config, load_config
from sedd_scale.data.prefetcher import Prefetcher
from sedd_scale.diffusion.corruption import Draw, NoisyBatch
from sedd_scale.diffusion.process import process_of
from sedd_scale.engine.engine import Engine, MicroBatch, make_engine
from sedd_scale.engine.update_gate import StepNumbers
from sedd_scale.files.package import CONFIGS
from sedd_scale.model.network import layer_builders
from sedd_scale.parallel.layout import Layout
from sedd_scale.training.batches import micro_batch_of
from sedd_scale.training.optimizer import make_optimizer

LEARNING_RATE = 1e-4


def synthetic_config(arguments: argparse.Namespace, *overrides: str, world_size: int) -> Config:
    """The configuration of a run, from `arguments.add_shape_arguments` and further overrides.

    Those of the command line come last. Raises ConfigError as `load_config` and `validate` do.
    """
    named = CONFIGS / "models" / f"{arguments.model}.yaml"
    config = load_config(
        named if named.is_file() else arguments.model,
        [
            f"model.vocab_size={arguments.vocab_size}",
            "model.zero_init=false",  # a head of zeros would make every logit the same
            f"data.block_length={arguments.block_length}",
            f"training.micro_batch={arguments.batch_size}",
            *overrides,
            *arguments.overrides,
        ],
    )
    data = config.data_parallel(world_size)
    config = config.override(
        f"training.global_batch={arguments.batch_size * arguments.accumulate * data}"
    )
    config.validate(world_size)
    return config


class SyntheticRun:
    """An engine on random tokens; the same tokens and noise at the same step, in every process."""

    def __init__(self, config: Config, layout: Layout) -> None:
        assert config.model.vocab_size is not None and config.data.block_length is not None
        self.config, self.layout = config, layout
        self.length = config.data.block_length
        self.process = process_of(config, config.model.vocab_size)
        self.graph, self.objective = self.process.graph, self.process.objective
        self.builders: list[Any] = layer_builders(config, self.graph, layout)

    def engine(self) -> Engine:
        """The engine that training uses, with its optimizer."""
        return make_engine(
            self.builders,
            self.layout,
            self.config,
            functools.partial(make_optimizer, self.config),
        )

    def noisy_batch(self, step: int) -> NoisyBatch:
        """This rank's share of a step, corrupted on the host.

        Times lie in the middle of their strata, so that every step masks about as much.
        """
        training = self.config.training
        per_rank = training.global_batch // self.layout.data
        first = self.layout.data_rank * per_rank
        clean_BL = torch.stack(
            [
                torch.randint(
                    self.graph.num_tokens,
                    (self.length,),
                    generator=torch.Generator().manual_seed(step * training.global_batch + sample),
                )
                for sample in range(first, first + per_rank)
            ]
        )
        middle_B = (torch.arange(first, first + per_rank).double() + 0.5) / training.global_batch
        draw = Draw(
            training.seed, step, range(first, first + per_rank), global_batch=training.global_batch
        )
        t_min = self.process.t_min
        return self.process.corrupt(clean_BL, draw, t_B=t_min + (1 - t_min) * middle_B)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The same share as the engine takes it."""
        noisy = self.noisy_batch(step)
        size = self.config.training.micro_batch
        pin = self.layout.device.type == "cuda"
        return [
            micro_batch_of(
                noisy.part(slice(start, start + size)),
                self.graph,
                document_end=None,
                pin=pin,
                every_position=self.objective.causal,
                shift=self.config.training.shift,
            )
            for start in range(0, len(noisy.noisy_BL), size)
        ]

    def train_step(self, engine: Engine, step: int) -> StepNumbers:
        """One whole step, from tokens on the host to updated weights."""
        return _updated(engine, self.micro_batches(step))

    def program(self, engine: Engine) -> Callable[[], StepNumbers]:
        """What makes one step after the other.

        Where a GPU computes, the next batches are made meanwhile, as in training.
        """
        batches: Iterator[list[MicroBatch]] = map(self.micro_batches, itertools.count(1))
        if self.layout.device.type == "cuda":
            batches = Prefetcher(self.micro_batches, 1)
        return lambda: _updated(engine, next(batches))


def _updated(engine: Engine, batches: list[MicroBatch]) -> StepNumbers:
    numbers, applied = engine.train_step(batches, lr=LEARNING_RATE)
    assert applied, numbers
    return numbers
