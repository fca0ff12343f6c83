"""A batch of samples under way: their tokens, their draws and the network's outputs for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sedd_scale.model.logit_model import LogitModel
from sedd_scale.sampling.head_outputs import HeadOutputs
from sedd_scale.sampling.keyed_draws import KeyedDraws
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.sampling.time_grid import Step, time_steps
from sedd_scale.sampling.token_law import TokenLaw

StepObserver = Callable[[int, Tensor, Tensor], None]
"""Called with (step, time of each sample [B], tokens [B, L]) on the CPU when tokens changed."""


@dataclass
class BatchState:
    """What the step functions work on.

    Attributes:
        state_BL: present tokens on the model's device, changed in place.
        free_R: positions of the flattened [B * L] that are to be drawn.
        observer: called after every step that changed something, or None.
    """

    model: LogitModel
    settings: SamplerSettings
    state_BL: Tensor
    free_R: Tensor
    draws: KeyedDraws
    outputs: HeadOutputs
    law: TokenLaw
    observer: StepObserver | None = None

    @property
    def flat_R(self) -> Tensor:
        """The tokens as one row [B * L], a view."""
        return self.state_BL.view(-1)

    def steps(self) -> list[Step]:
        """The steps of the settings' grid of times."""
        settings, steps = self.settings, self.settings.resolved_steps
        assert steps is not None
        return time_steps(self.model.schedule, steps, settings.time_grid, settings.t_end)

    def masked_R(self) -> Tensor:
        """Bool [B * L]: free positions that hold the mask (absorb)."""
        return self.free_R & (self.flat_R == self.model.graph.mask_id)

    def put(self, rows_M: Tensor, tokens_M: Tensor) -> None:
        """Set tokens at positions of the flattened [B * L].

        Raises:
            CheckpointError: outputs of the network that they may come from are not finite.
        """
        self.law.finite.check()
        self.flat_R[rows_M] = tokens_M

    def sigma_B(self, sigma: Tensor) -> Tensor:
        """One noise level, or one per sample, as float64 [B] on the model's device."""
        return sigma.to(self.model.device, torch.float64).expand(len(self.state_BL))

    def draw_tokens(self, sigma_B: Tensor, rows_M: Tensor, uniform_R: Tensor) -> Tensor:
        """Tokens [M] for masked rows, from the law of a token; the state is left as it is."""
        tokens_M = torch.empty_like(rows_M)
        for chunk, logits_mN in self.outputs.chunks(self.state_BL, sigma_B, rows_M):
            tokens_M[chunk] = self.law.draw(logits_mN, uniform_R[rows_M[chunk]])
        return tokens_M

    def report(self, step: int, time: float | Tensor) -> None:
        """Tell the observer that the state has changed."""
        if self.observer is not None:
            time_B = torch.as_tensor(time, dtype=torch.float64).cpu().expand(len(self.state_BL))
            self.observer(step, time_B.clone(), self.state_BL.cpu().clone())
