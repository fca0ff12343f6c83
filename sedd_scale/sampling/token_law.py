"""The law of the token that takes a mask's place: softmax(z), tempered and cut as asked."""

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_scale.diffusion.reverse import draw_categorical
from sedd_scale.errors import CheckpointError
from sedd_scale.sampling.chunks import rows_per_chunk
from sedd_scale.sampling.settings import SamplerSettings

CPU_DRAW_BYTES = 16 * 2**20


class TokenLaw:
    """P(y) proportional to e^(z_y / temperature) over the tokens that top-k and top-p keep.

    The temperature comes first, then top-k, then top-p of what is left.
    """

    def __init__(self, settings: SamplerSettings) -> None:
        self.settings, self.finite = settings, Finite()
        self.dtype = {"float64": torch.float64, "float32": torch.float32}[settings.draw_dtype]

    def weights(self, logits_MN: Tensor) -> Tensor:
        """Non-negative weights [M, N] in the dtype of the draws; rows need not sum to 1."""
        settings = self.settings
        logits_MN = logits_MN.to(self.dtype)
        if settings.temperature != 1.0:
            logits_MN = logits_MN / settings.temperature
        weights_MN = torch.exp(logits_MN - logits_MN.amax(dim=1, keepdim=True))
        num_tokens = weights_MN.shape[1]
        if settings.top_k is not None and settings.top_k < num_tokens:
            keep_Mk = weights_MN.topk(settings.top_k, dim=1)
            weights_MN = torch.zeros_like(weights_MN).scatter(1, keep_Mk.indices, keep_Mk.values)
        if settings.top_p < 1.0:
            sorted_MN, order_MN = weights_MN.sort(dim=1, descending=True, stable=True)
            before_MN = sorted_MN.cumsum(dim=1) - sorted_MN
            # A token is kept where those likelier than it do not reach top_p by themselves.
            kept = before_MN < settings.top_p * sorted_MN.sum(dim=1, keepdim=True)
            kept[:, 0] = True
            weights_MN = torch.zeros_like(weights_MN).scatter(1, order_MN, sorted_MN * kept)
        return weights_MN

    def draw(self, logits_MN: Tensor, uniform_M: Tensor) -> Tensor:
        """Int64 tokens [M], one per row; a few rows at a time, to hold few weights at once.

        Whatever they are where an output is not a finite number, which `finite` then knows.
        """
        self.finite.note(logits_MN.sum(dim=1))
        if self.settings.temperature == 0:
            return logits_MN.argmax(dim=1)
        return self._draw(logits_MN, uniform_M, self.weights)

    def draw_weights(self, weights_MN: Tensor, uniform_M: Tensor) -> Tensor:
        """Int64 tokens [M] by non-negative weights, which temperature and cuts do not touch."""
        return self._draw(weights_MN, uniform_M, lambda rows: rows)

    def _draw(
        self, rows_MN: Tensor, uniform_M: Tensor, weights: Callable[[Tensor], Tensor]
    ) -> Tensor:
        step = rows_per_chunk(
            rows_MN.device, row_bytes=8 * rows_MN.shape[1], cpu_bytes=CPU_DRAW_BYTES
        )
        tokens = [
            draw_categorical(
                weights(rows_MN[at : at + step]), uniform_M[at : at + step], dtype=self.dtype
            )
            for at in range(0, len(rows_MN), step)
        ]
        return torch.cat(tokens) if tokens else uniform_M.new_empty(0, dtype=torch.int64)


class Finite:
    """Whether outputs of the network are finite: noted with every chunk, asked once a step.

    A host that asked with every chunk would wait for the device as often.
    """

    def __init__(self) -> None:
        self._all: Tensor | None = None

    def note(self, statistic_M: Tensor) -> None:
        """Remember whether a statistic of some outputs is finite."""
        here = torch.isfinite(statistic_M).all()
        self._all = here if self._all is None else self._all & here

    def check(self) -> None:
        """Raise CheckpointError where one was not."""
        if self._all is not None and not bool(self._all):
            raise CheckpointError(
                "the network's outputs are not finite: its weights are damaged or its training "
                "diverged; use another checkpoint"
            )
        self._all = None
