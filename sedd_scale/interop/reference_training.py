"""checkpoint.pth of the authors' training program, read and written.

    model      state dict of the network, the rotary frequencies included
    ema        decay, num_updates, shadow_params: the averages, in the order of the parameters
    optimizer  state dict of torch's AdamW: exp_avg, exp_avg_sq and step by the parameter's number
    step       steps of the run

Averages and moments are told apart by position alone. The order is that of the state dict; where
shapes contradict it, the order of the authors' modules.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd_scale.arrays import Shape
from sedd_scale.checkpoint.reading import check_tensors
from sedd_scale.errors import CheckpointError
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.checkpoint_source import CheckpointSource
from sedd_scale.interop.foreign_config import SEDD, Said, known_of
from sedd_scale.interop.foreign_files import CheckpointFiles, Weights, entry_of
from sedd_scale.interop.foreign_source import ForeignSource, shadow_parameters
from sedd_scale.interop.pickled_files import placeholder, tensors_in, write_pickled
from sedd_scale.interop.sedd_directory import check_expressible, published_shapes
from sedd_scale.interop.sedd_names import (
    INV_FREQ,
    published_names,
    published_rows,
    rotary_frequencies,
)
from sedd_scale.planning.model_states import STATE_KEYS

MOMENTS = ("exp_avg", "exp_avg_sq")


class ReferenceTrainingSource(ForeignSource):
    """A checkpoint.pth, or the directory it is in: as `ForeignSource`, with moments and steps."""

    format = "sedd-train"

    def __init__(self, files: CheckpointFiles, assumptions: Assumptions) -> None:
        super().__init__(files, assumptions, path=files.weights)
        tree, order = self._weights.tree, self._order
        numbered, group = _optimizer_state(self.path, tree["optimizer"])
        optimizer_step = 0
        if any(numbered):
            self._take_moments(numbered)
            optimizer_step = self._optimizer_step(numbered[: len(order)])
            self.holds = frozenset(STATE_KEYS)
        optimizer = {
            name: group[name]
            for name in ("lr", "eps", "weight_decay")
            if isinstance(group.get(name), float | int)
        }
        if optimizer.get("lr") == 0:  # before the first step of a warm-up
            del optimizer["lr"]
        config = self.described.config
        decay = float(tree["ema"].get("decay", config.optimizer.ema_decay))
        if 0 <= decay < 1:
            optimizer["ema_decay"] = decay
        num_updates = tree["ema"].get("num_updates", optimizer_step)
        self.described = replace(
            self.described,
            config=config.override(*(f"optimizer.{key}={v!r}" for key, v in optimizer.items())),
            step=_count(self.path, "step", tree["step"]),
            optimizer_step=optimizer_step,
            details={
                "parameter_order": order,
                "num_updates": _count(self.path, "num_updates", num_updates),
                "param_group": _plain(group),
                "extra_parameters": len(numbered) - len(order),
            },
        )

    @staticmethod
    def claims(files: CheckpointFiles) -> bool:
        """Whether a model is there, and averages without names; without any it is cut short."""
        tree = files.pickled.tree if files.pickled is not None else None
        if not isinstance(tree, dict) or "model" not in tree or "state_dict" in tree:
            return False
        ema = tree.get("ema")
        if isinstance(ema, dict):
            return "shadow_params" in ema
        return "optimizer" in tree or "step" in tree

    def _known(self, file: Path, weights: Weights, assumptions: Assumptions) -> dict[str, Said]:
        for key in ("model", "ema", "optimizer", "step"):
            if key not in weights.tree:
                raise CheckpointError(
                    f"{file} is not a training checkpoint: missing {key} (it has "
                    f"{', '.join(map(str, list(weights.tree)[:6]))}; it needs model, ema, "
                    "optimizer, step)"
                )
        shadow_parameters(file, weights.tree["ema"])
        own = {key: Said(value, self.format) for key, value in SEDD.items()}
        return {**own, **known_of(file, {}, assumptions)}

    def _take_moments(self, numbered: Sequence[Mapping[str, Any]]) -> None:
        count = len(self._order)
        found: dict[str, Shape] = {}
        wanted: dict[str, Shape] = {}
        for key in MOMENTS:
            self._tensors[key] = {
                name: entry_of(self._weights.file, f"{name} ({key})", own[key])
                for name, own in zip(self._order, numbered, strict=False)
                if isinstance(own.get(key), Tensor)
            }
            found |= {f"{name}/{key}": entry.shape for name, entry in self._tensors[key].items()}
            wanted |= {f"{name}/{key}": self._tensors["ema"][name].shape for name in self._order}
        check_tensors(self.path, wanted, found)
        for number, own in enumerate(numbered[count:], start=count):
            # The noise of the authors' program is one number that nothing ever changes.
            if any(isinstance(value, Tensor) and value.numel() > 1 for value in own.values()):
                raise CheckpointError(
                    f"{self.path}: the optimizer has a parameter {number} more than the {count} "
                    f"of the model, of shape {[list(t.shape) for t in tensors_in(dict(own))]}"
                )

    def _optimizer_step(self, numbered: Sequence[Mapping[str, Any]]) -> int:
        steps = set()
        for own in numbered:
            step = own.get("step")
            if isinstance(step, Tensor):
                step = entry_of(self._weights.file, "step", step).read().item()
            if step is None:
                raise CheckpointError(f"{self.path}: the optimizer's state has no step")
            steps.add(int(step))
        if len(steps) != 1:
            raise CheckpointError(
                f"{self.path}: the optimizer has made {min(steps)} updates of some parameters and "
                f"{max(steps)} of others; a checkpoint of ours has one number for all"
            )
        return steps.pop()


def write_reference_training(
    path: Path, source: CheckpointSource, *, extra_parameters: int | None = None
) -> None:
    """Write a checkpoint.pth with weights, averages, moments and steps of a source.

    Args:
        extra_parameters: parameters without state that the optimizer lists after the network's;
            None: as many as the source's had, else 0.

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
            model[INV_FREQ] = known(rotary_frequencies(config.trunk.head_dim))
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


def _optimizer_state(path: Path, optimizer: Any) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """State of each parameter the optimizer lists, empty where it has none, and its settings."""
    is_one = isinstance(optimizer, dict)
    state, groups = (optimizer.get(key) if is_one else None for key in ("state", "param_groups"))
    if not isinstance(state, dict) or not isinstance(groups, list) or not groups:
        raise CheckpointError(
            f"{path}: optimizer has no state and param_groups, as torch's AdamW has"
        )
    numbers = [number for group in groups for number in group["params"]]
    settings = {key: value for key, value in groups[0].items() if key != "params"}
    return [state.get(number, {}) for number in numbers], settings


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
