"""What a checkpoint without a configuration does not say, and is said by the user or assumed.

Sizes follow from the shapes of tensors. The graph, the noise and the block length do not.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from sedd_scale.errors import ConfigError


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


# What a help text calls a value.
_METAVARS = {int: "N", float: "X", str: "PREFIX", _boolean: "BOOL"}
_OWN_METAVARS = {"mask_id": "ID", "data.block_length": "L"}


def _said(help: str, key: str, kind: Any) -> Any:
    """A field: its flag's help, our key for it, and its type or choices."""
    options: dict[str, Any] = {"choices": kind}
    if not isinstance(kind, tuple):
        options = {"type": kind, "metavar": _OWN_METAVARS.get(key, _METAVARS[kind])}
    return field(default=None, metadata={"help": help, "key": key, "options": options})


@dataclass(frozen=True)
class Assumptions:
    """One field a thing that shapes cannot tell; None: what the files say, or else assumed.

    Attributes:
        spelling: None: they are given as flags, `--mask-id 4`; else what stands before
            `mask_id=4`.
        otherwise: fields' values for what neither the files nor the user say.
    """

    objective: str | None = _said(
        "what it was trained for (assumed for mdlm: masked_cross_entropy)",
        "training.objective",
        ("score_entropy", "masked_cross_entropy", "d3pm_absorb"),
    )
    parametrisation: str | None = _said(
        "outputs are log-scores (score), or logits of the clean token (mean: Duo, UDLM)",
        "model.parametrisation",
        ("score", "mean"),
    )
    graph: str | None = _said(
        "forward process (assumed: absorb)", "graph.name", ("absorb", "uniform")
    )
    mask_id: int | None = _said(
        "id of the mask among its states (assumed: the last); tokens behind it move up by one",
        "mask_id",
        int,
    )
    noise: str | None = _said(
        "noise schedule (assumed: loglinear)",
        "noise.name",
        ("loglinear", "geometric", "cosine", "linear"),
    )
    sigma_min: float | None = _said("of geometric noise (assumed: 1e-4)", "noise.sigma_min", float)
    sigma_max: float | None = _said("of geometric noise (assumed: 20)", "noise.sigma_max", float)
    eps: float | None = _said("of other noise (assumed: 1e-3)", "noise.eps", float)
    block_length: int | None = _said(
        "tokens in a sequence (assumed: 1024)", "data.block_length", int
    )
    num_heads: int | None = _said(
        "attention heads (from its rotary frequencies; else assumed: width / 64)",
        "model.num_heads",
        int,
    )
    scale_by_sigma: bool | None = _said(
        "scaled scores, true or false (assumed: true for absorb, false for uniform)",
        "model.scale_by_sigma",
        _boolean,
    )
    time_conditioning: bool | None = _said(
        "whether outputs depend on sigma (assumed: true; false for masked_cross_entropy)",
        "model.time_conditioning",
        _boolean,
    )
    network: str | None = _said(
        "of several networks in a file, what the names of this one begin with", "", str
    )

    spelling: str | None = None
    otherwise: Mapping[str, Any] = field(default_factory=dict)

    def given(self) -> list[str]:
        """Names of the fields that were set."""
        return [name for name in KEYS if getattr(self, name) is not None]

    def spelled(self, **values: Any) -> str:
        """How the user gives fields these values; None: the name alone."""
        words = []
        for name, value in values.items():
            word = "--" + _FLAGS.get(name, name)
            word = word.replace("_", "-") if self.spelling is None else word[2:]
            equals = " " if self.spelling is None else "="
            words.append(word if value is None else f"{word}{equals}{text_of(value)}")
        return " ".join(words) if self.spelling is None else self.spelling + ",".join(words)


# Our key of each field; "network" has none.
KEYS = {item.name: item.metadata["key"] for item in fields(Assumptions) if item.metadata}
# A command may have a flag of its own of that name.
_DEST = "said_{}"
# Where the flag is not the name.
_FLAGS = {"eps": "noise_eps"}


def text_of(value: Any) -> str:
    """A value as a user writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def add_assumptions(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of `Assumptions`."""
    group = parser.add_argument_group(
        "what a checkpoint of another program does not say (sizes follow from its tensors)"
    )
    for item in fields(Assumptions):
        if item.metadata and item.name not in leave_out:
            help, options = item.metadata["help"], item.metadata["options"]
            flag = Assumptions().spelled(**{item.name: None})
            group.add_argument(flag, dest=_DEST.format(item.name), help=help, **options)


def assumptions_of(
    arguments: argparse.Namespace, *, spelling: str | None = None, **otherwise: Any
) -> Assumptions:
    """What the flags of `add_assumptions` say; `spelling` and `otherwise` as of `Assumptions`."""
    found = {name: getattr(arguments, _DEST.format(name), None) for name in KEYS}
    return Assumptions(**found, spelling=spelling, otherwise=otherwise)


class _ByName(argparse.ArgumentParser):
    """Takes options whose names have no dashes, and raises what it finds wrong."""

    def error(self, message: str) -> NoReturn:
        named = re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), message)
        raise ConfigError(f"{self.prog}: {named}")


def given_by_name(
    add: Callable[[argparse.ArgumentParser], None], values: Mapping[str, Any], what: str
) -> argparse.Namespace:
    """A command's options given as name=value, where there is no command line.

    Args:
        add: adds the options.
        values: by their flags' names, `mask_id` for --mask-id; None: not given.
        what: what errors call the place they are given in.

    Raises:
        ConfigError: an option is unknown, missing, or has a value that it does not take.
    """
    parser = _ByName(prog=what, allow_abbrev=False, add_help=False)
    add(parser)
    return parser.parse_args(
        [
            f"--{name.replace('_', '-')}={text_of(value)}"
            for name, value in values.items()
            if value is not None
        ]
    )
