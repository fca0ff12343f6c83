"""checkpoint.pth of the authors' training program, read and written.

    model      state dict of the network, the rotary frequencies included
    ema        decay, num_updates, shadow_params: the averages, in the order of the parameters
    optimizer  state dict of torch's AdamW: exp_avg, exp_avg_sq and step by the parameter's number
    step       steps of the run

Averages and moments are told apart by position alone. The order is that of the state dict; where
shapes contradict it, the order of the authors' modules.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import (
    CheckpointSource,
    Description,
    Shape,
    check_tensors,
)
from sedd_scale.interop.foreign_config import SEDD, Said, assumed, known_of, mask_of
from sedd_scale.interop.foreign_files import Entry, entry_of, open_weights, weights_file
from sedd_scale.interop.foreign_shapes import config_of_shapes
from sedd_scale.interop.pickled_files import placeholder, tensors_in, write_pickled
from sedd_scale.interop.sedd_directory import (
    check_expressible,
    published_shapes,
    without_buffer,
)
from sedd_scale.interop.sedd_names import (
    INV_FREQ,
    our_rows,
    published_names,
    published_rows,
    rotary_frequencies,
)
from sedd_scale.planning.model_states import STATE_KEYS

MOMENTS = ("exp_avg", "exp_avg_sq")


class ReferenceTrainingSource(CheckpointSource):
    """A checkpoint.pth.

    Args:
        path: the file, or the directory it is in.
        assumptions: the graph, the noise and what else the file does not say.

    Raises:
        CheckpointError: it is no such file, or a tensor is missing, unknown or misshapen.
    """

    format = "sedd-train"

    def __init__(self, path: Path, assumptions: Assumptions | None = None) -> None:
        self.path = weights_file(path)
        assumptions = assumptions or Assumptions()
        weights = open_weights(self.path, assumptions.network)
        assert weights.file is not None
        tree, shapes, self._file = weights.tree, weights.network.shapes, weights.file
        for key in ("model", "ema", "optimizer", "step"):
            if key not in tree:
                raise CheckpointError(
                    f"{self.path} is not a training checkpoint: missing {key} (it has "
                    f"{', '.join(map(str, list(tree)[:6]))}; it needs model, ema, optimizer, step)"
                )
        own = {key: Said(value, self.format) for key, value in SEDD.items()}
        known = {**own, **known_of(self.path, {}, assumptions)}
        config = config_of_shapes(self.path, shapes, known)
        expected = published_shapes(config)
        check_tensors(self.path, expected, without_buffer(shapes))

        averages = shadow_parameters(self.path, tree["ema"])
        numbered, group = _optimizer_state(self.path, tree["optimizer"])
        listed = [tuple(tensor.shape) for tensor in averages]
        order = parameter_order(self.path, expected, list(without_buffer(shapes)), listed)
        self._tensors: dict[tuple[str, str], Entry] = {}
        self.mask_id = mask_of(self.path, known, config)
        for number, name in enumerate(order):
            self._tensors[name, "master"] = weights.network.tensors[name]
            self._tensors[name, "ema"] = self._entry(name, "ema", averages[number])
        optimizer_step, self.holds = 0, frozenset({"master", "ema"})
        if any(numbered):
            self._take_moments(order, expected, numbered)
            optimizer_step = self._optimizer_step(numbered[: len(order)])
            self.holds = frozenset(STATE_KEYS)
        optimizer = {
            name: group[name]
            for name in ("lr", "eps", "weight_decay")
            if isinstance(group.get(name), float | int)
        }
        overrides = [f"optimizer.{name}={value!r}" for name, value in optimizer.items()]
        decay = float(tree["ema"].get("decay", config.optimizer.ema_decay))
        if 0 <= decay < 1:
            overrides.append(f"optimizer.ema_decay={decay!r}")
        if optimizer.get("lr") == 0:  # before the first step of a warm-up
            overrides.remove(f"optimizer.lr={optimizer['lr']!r}")
        self.described = Description(
            config=config.override(*overrides),
            block_length=config.data.block_length,
            step=_count(self.path, "step", tree["step"]),
            optimizer_step=optimizer_step,
            details={
                "parameter_order": order,
                "num_updates": _count(
                    self.path, "num_updates", tree["ema"].get("num_updates", optimizer_step)
                ),
                "param_group": _plain(group),
                "extra_parameters": len(numbered) - len(order),
            },
            assumed=assumed(known, config, INV_FREQ in shapes),
        )
        self._theirs = {
            ours: name for name, ours in published_names(config.model.num_layers).items()
        }

    def _entry(self, name: str, key: str, tensor: Tensor) -> Entry:
        return entry_of(self._file, f"{name} ({key})", tensor)

    def _take_moments(
        self,
        order: Sequence[str],
        expected: Mapping[str, Shape],
        numbered: Sequence[Mapping[str, Any]],
    ) -> None:
        found = {}
        for number, name in enumerate(order):
            own = numbered[number] if number < len(numbered) else {}
            for key in MOMENTS:
                if isinstance(own.get(key), Tensor):
                    self._tensors[name, key] = self._entry(name, key, own[key])
                    found[f"{name}/{key}"] = tuple(own[key].shape)
        wanted = {f"{name}/{key}": expected[name] for name in order for key in MOMENTS}
        check_tensors(self.path, wanted, found)
        for number, own in enumerate(numbered[len(order) :], start=len(order)):
            # The noise of the authors' program is one number that nothing ever changes.
            if any(isinstance(value, Tensor) and value.numel() > 1 for value in own.values()):
                raise CheckpointError(
                    f"{self.path}: the optimizer has a parameter {number} more than the "
                    f"{len(order)} of the model, of shape "
                    f"{[list(t.shape) for t in tensors_in(dict(own))]}"
                )

    def _optimizer_step(self, numbered: Sequence[Mapping[str, Any]]) -> int:
        steps = set()
        for own in numbered:
            step = own.get("step")
            if isinstance(step, Tensor):
                step = self._file.read(step).item()
            if step is None:
                raise CheckpointError(f"{self.path}: the optimizer's state has no step")
            steps.add(int(step))
        if len(steps) != 1:
            raise CheckpointError(
                f"{self.path}: the optimizer has made {min(steps)} updates of some parameters and "
                f"{max(steps)} of others; a checkpoint of ours has one number for all"
            )
        return steps.pop()

    def _read(self, name: str, key: str) -> Tensor:
        tensor = self._tensors[self._theirs[name], key].read()
        num_heads = self.described.config.model.num_heads
        return our_rows(name, tensor, num_heads, mask_id=self.mask_id)

    def contents(self) -> list[tuple[str, Shape, str, int]]:
        """Name, shape, type and bytes of each tensor as the file has them."""
        return [entry.row for entry in self._tensors.values()]


def write_reference_training(
    path: Path, source: CheckpointSource, *, extra_parameters: int | None = None
) -> None:
    """Write a checkpoint.pth with weights, averages, moments and steps of a source.

    Args:
        extra_parameters: parameters without state that the optimizer lists after the network's;
            None: as many as the checkpoint.pth had that the source came from, else 0.

    Raises:
        CheckpointError: the authors' program has no such model.
    """
    described = source.described
    check_expressible(described, fixed_mlp_ratio=False)
    config, details = described.config, described.details
    names = published_names(config.model.num_layers)
    shapes = published_shapes(config)
    order = list(details.get("parameter_order", shapes))
    if sorted(order) != sorted(shapes):
        order = list(shapes)
    numbers: dict[int, Callable[[], Tensor]] = {}

    def lazy(name: str, key: str) -> Tensor:
        tensor = placeholder(shapes[name])
        ours = names[name]
        numbers[id(tensor)] = lambda: published_rows(
            ours, source.read(ours, key), config.model.num_heads
        )
        return tensor

    def known(tensor: Tensor) -> Tensor:
        empty = placeholder(tuple(tensor.shape))
        numbers[id(empty)] = lambda: tensor
        return empty

    model: dict[str, Tensor] = {}
    for name in order:
        if name.startswith("blocks.") and INV_FREQ not in model:
            model[INV_FREQ] = known(rotary_frequencies(config.head_dim))
        model[name] = lazy(name, "master")
    step = torch.tensor(float(described.optimizer_step))
    state = {
        number: {"step": known(step), **{key: lazy(name, key) for key in MOMENTS}}
        for number, name in enumerate(order)
    }
    if extra_parameters is None:
        extra_parameters = int(details.get("extra_parameters", 0))
    optimizer = config.optimizer
    group = {
        "lr": optimizer.lr,
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "amsgrad": False,
        "foreach": None,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        **details.get("param_group", {}),
    }
    group["betas"] = tuple(group["betas"])
    tree = {
        "model": model,
        "ema": {
            "decay": optimizer.ema_decay,
            "num_updates": details.get("num_updates", described.optimizer_step),
            "shadow_params": [lazy(name, "ema") for name in order],
        },
        "optimizer": {
            "state": state if "exp_avg" in source.holds else {},
            "param_groups": [{**group, "params": list(range(len(order) + extra_parameters))}],
        },
        "step": described.step,
    }
    write_pickled(path, tree, numbers)


def shadow_parameters(path: Path, ema: Any) -> list[Tensor]:
    """The averages of an `ema` entry, in order.

    Raises:
        CheckpointError: there are none.
    """
    averages = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(averages, list | tuple) or not all(isinstance(t, Tensor) for t in averages):
        raise CheckpointError(
            f"{path}: ema has no shadow_params, a list of tensors in the order of the parameters"
        )
    return list(averages)


def parameter_order(
    path: Path, expected: Mapping[str, Shape], listed: Sequence[str], shapes: Sequence[Shape]
) -> list[str]:
    """Names of the parameters in the order in which their shapes come.

    Args:
        expected: shape of each parameter, in the order of the authors' modules.
        listed: the order of the file's state dict.
        shapes: of the positional tensors.

    Raises:
        CheckpointError: their number or their shapes fit no order.
    """
    if len(shapes) != len(expected):
        raise CheckpointError(
            f"{path}: ema.shadow_params has {len(shapes)} tensors, the model {len(expected)} "
            "parameters"
        )
    for order in (list(listed), list(expected)):
        if [expected[name] for name in order] == list(shapes):
            return order
    number, name = next(
        (number, name)
        for number, name in enumerate(listed)
        if tuple(expected[name]) != tuple(shapes[number])
    )
    raise CheckpointError(
        f"{path}: ema.shadow_params[{number}] is {list(shapes[number])} and should be {name} "
        f"{list(expected[name])}"
    )


def _optimizer_state(path: Path, optimizer: Any) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """State of each parameter the optimizer lists, empty where it has none, and its settings."""
    optimizer = _dictionary(path, "optimizer", optimizer)
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list) or not groups:
        raise CheckpointError(
            f"{path}: optimizer has no state and param_groups, as torch's AdamW has"
        )
    numbers = [number for group in groups for number in group["params"]]
    settings = {key: value for key, value in groups[0].items() if key != "params"}
    return [state.get(number, {}) for number in numbers], settings


def _dictionary(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: {what} is a {type(value).__name__} and should be a dictionary"
        )
    return value


def _count(path: Path, what: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise CheckpointError(f"{path}: {what} is no number: fetch it again") from None


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that JSON can hold."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in group.items()
        if isinstance(value, bool | int | float | str | tuple | None)
    }
