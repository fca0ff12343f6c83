"""AdamW that keeps the exponential moving average (EMA) of the weights beside its moments.

As one more state tensor the average is partitioned, saved and resumed with everything else that
AdamW holds, under every ZeRO stage and pipeline layout.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sedd_scale.planning.model_states import ADAMW, UpdateRule


class AdamWithEMA(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) and the EMA of the weights it makes.

    A parameter's state is `step` (updates so far) and `exp_avg`, `exp_avg_sq` and `ema`, each of
    the parameter's shape and type. The average starts as a copy of the weights before the first
    update; the n-th update moves it by 1 - min(ema_decay, (1 + n) / (10 + n)), as Lou et al.
    (arXiv 2310.16834) train.

    Attributes:
        rules: how each parameter is updated: its group's "rule", or AdamW's.
        found_inf: 1 leaves weights, moments and averages as they are and only counts the step, 0
            does not; a float32 scalar on the parameters' device, or None.
        grad_scale: what gradients are divided by; the same.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
    ) -> None:
        assert 0.0 <= ema_decay < 1.0, ema_decay
        super().__init__(
            parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        self.ema_decay = ema_decay
        self.rules: dict[Tensor, UpdateRule] = {
            parameter: group.get("rule", ADAMW)
            for group in self.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def initialize_state(self, parameter: Tensor, rule: UpdateRule | None = None) -> dict[str, Any]:
        """The parameter's state, made as before a first update if there is none yet.

        Args:
            rule: how it is updated; None: as its group says.
        """
        state: dict[str, Any] = self.state[parameter]
        if not state:
            # AdamW makes its own state only where it finds none, so all of it is made here.
            state["step"] = torch.zeros((), device=parameter.device)
            for key in (rule or self._rule_of(parameter)).moments:
                state[key] = torch.zeros_like(parameter)
            state["ema"] = parameter.detach().clone()
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then fold it into its average."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for parameter in parameters:
            self.initialize_state(parameter)
        super().step()
        for parameter in parameters:
            # The count stays on its device, where nothing has to wait for it.
            if self.found_inf is not None:
                self.state[parameter]["step"] += self.found_inf  # which AdamW does not count then
            self._fold(parameter)
        return loss

    def _fold(self, parameter: Tensor) -> None:
        """Move the average towards what the update has made."""
        state = self.state[parameter]
        move = 1.0 - ema_decay_after(state["step"], self.ema_decay)
        if self.found_inf is not None:
            move *= 1.0 - self.found_inf
        state["ema"].lerp_(parameter.detach(), move.to(parameter.dtype))

    def _rule_of(self, parameter: Tensor) -> UpdateRule:
        """Of a group's parameter, in whose place an engine may have put its partition."""
        for group in self.param_groups:
            if any(parameter is one for one in group["params"]):
                return group.get("rule", ADAMW)
        return ADAMW

    def connect(self, fragments: Any) -> None:
        """Tell it of the engine's fragments; AdamW needs none of them."""


def ema_decay_after(n: Tensor, ema_decay: float) -> Tensor:
    """Decay of the average at the n-th update, counted from 1: it warms up from 2/11."""
    n = n.double()
    return ((1 + n) / (10 + n)).clamp_max(ema_decay)
