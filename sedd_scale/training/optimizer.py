"""The optimizer that a configuration names, of parameters in groups of one rule."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from sedd_scale.config import Config
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.planning.model_states import UpdateRule, update_rule
from sedd_scale.training.adamw import AdamWithEMA
from sedd_scale.training.muon import MuonWithEMA


def make_optimizer(
    config: Config,
    parameters: Sequence[LogicalParameter],
    cut: Callable[[list[nn.Parameter]], list[list[nn.Parameter]]] = lambda weights: [weights],
) -> AdamWithEMA:
    """The optimizer that is configured, with the average of the weights.

    Parameters of one update rule are together in its groups, in their order.

    Args:
        cut: into what groups those of one rule go.
    """
    of_rule: dict[UpdateRule, list[nn.Parameter]] = {}
    for logical in parameters:
        rule = update_rule(config.optimizer.name, logical.name)
        of_rule.setdefault(rule, []).append(logical.parameter)
    groups = [
        {"params": weights, "rule": rule}
        for rule, of_parts in of_rule.items()
        for weights in cut(list(dict.fromkeys(of_parts)))
    ]
    return optimizer_of(config, groups)


def optimizer_of(config: Config, groups: Iterable[Any]) -> AdamWithEMA:
    """The configured optimizer of parameters, or groups of them."""
    optimizer = config.optimizer
    options: dict[str, Any] = dict(
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        ema_decay=optimizer.ema_decay,
    )
    if optimizer.name == "adamw":
        return AdamWithEMA(groups, **options)
    return MuonWithEMA(
        groups,
        trunk=config.trunk,
        momentum=optimizer.muon_momentum,
        lr_ratio=optimizer.muon_lr_ratio,
        **options,
    )
