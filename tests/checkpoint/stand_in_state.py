"""A tensor and its moments in place of an engine's: what saves and loads need, and no more."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sedd_scale.engine.fragments import Fragment
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout
from sedd_scale.planning.model_states import STATE_KEYS


def value_at(step: int, key: str) -> float:
    """What every number of a state tensor is at a step."""
    return float(step) + STATE_KEYS.index(key) / 8


def parameter(shape: tuple[int, ...]) -> LogicalParameter:
    """The one parameter that the state is of."""
    return LogicalParameter(
        name="weight",
        parameter=nn.Parameter(torch.zeros(shape)),
        local_shape=shape,
        shape=shape,
        partition_dim=None,
        offset=0,
    )


def meta_of(step: int) -> dict[str, Any]:
    """What a run says of itself at a step."""
    return {
        "step": step,
        "samples_seen": step,
        "tokens": step,
        "config": {},
        "dataset_fingerprint": "d",
        "tokenizer_fingerprint": "t",
        "num_tokens": 2,
        "block_length": 1,
    }


class StandInState:
    """This process's share of the four tensors, whose numbers tell their step.

    Args:
        shape: of each whole tensor, whose numbers are cut evenly over the processes.
    """

    def __init__(self, shape: tuple[int, ...], layout: Layout) -> None:
        self.parameters, self.layout = [parameter(shape)], layout
        own = math.prod(shape) // layout.data
        self._start = layout.data_rank * own
        self._flat = {key: torch.zeros(own) for key in STATE_KEYS}
        self.step = 0

    def ensure_state(self) -> None:
        """It is there from the start."""

    def refresh_parameters(self) -> None:
        """There are no working copies."""

    def states(self) -> Iterator[tuple[LogicalParameter, str]]:
        """The one parameter with every key."""
        return ((self.parameters[0], key) for key in STATE_KEYS)

    def get(self, _: LogicalParameter, key: str) -> Fragment:
        """This process's share."""
        return Fragment(self._flat[key], self._start)

    def get_step(self) -> int:
        """Updates made."""
        return self.step

    def set_step(self, step: int) -> None:
        """Go on from a step."""
        self.step = step

    def fill(self, step: int) -> None:
        """Be as the training leaves it at a step."""
        self.step = step
        for key, flat in self._flat.items():
            flat.fill_(value_at(step, key))

    def is_of(self, step: int) -> bool:
        """Whether every number is that of a step."""
        return all(bool((flat == value_at(step, key)).all()) for key, flat in self._flat.items())
