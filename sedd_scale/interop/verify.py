"""Whether two checkpoints are the same model: their log-scores on the same noisy sequences."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sedd_scale.errors import CheckpointError
from sedd_scale.interop import FORMATS
from sedd_scale.interop.assumptions import Assumptions
from sedd_scale.interop.formats import detect_format
from sedd_scale.interop.pretrained import load_pretrained
from sedd_scale.model.score_model import ScoreModel

# Times of the noisy sequences, early to late.
TIMES = (0.1, 0.5, 0.9)
LONGEST = 128


@dataclass(frozen=True)
class Comparison:
    """How far apart the log-scores of two checkpoints are.

    Attributes:
        max_difference: largest absolute difference, in nats; NaN where either is not finite.
        max_score: largest absolute log-score of the first.
        num_scores: how many were compared.
    """

    max_difference: float
    max_score: float
    num_scores: int


def verify(
    first: str | Path,
    second: str | Path,
    *,
    weights: str = "ema",
    assumptions: Assumptions | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare log-scores of two checkpoints of any formats, float32, one model in memory at a time.

    Args:
        weights: where a checkpoint has both, "ema" or "master".
        seed: of the sequences: tokens drawn at random, moved by the graph at `TIMES`. Of causal
            networks that are never shown a mask they stay as they are.

    Raises:
        CheckpointError: one of them cannot be read, or they are of different processes or sizes.
    """
    scores: list[Tensor] = []
    identity: list[dict[str, object]] = []
    for path in (Path(first), Path(second)):
        own = None if FORMATS[detect_format(path)].says_all else assumptions
        model = load_pretrained(path, device="cpu", weights=weights, assumptions=own)
        identity.append(_identity(model))
        if len(identity) == 2:
            for what, value in identity[0].items():
                if value != (other := identity[1][what]):
                    raise CheckpointError(
                        f"{first} and {second} are different models: {what} is {value} and {other}"
                    )
        scores.append(_log_scores(model, seed))
        del model
    difference = (scores[0].double() - scores[1].double()).abs()
    return Comparison(
        max_difference=float(difference.max()),  # NaN if any is
        max_score=float(scores[0].abs().max()),
        num_scores=scores[0].numel(),
    )


def _identity(model: ScoreModel) -> dict[str, object]:
    return {
        "graph": model.graph.name,
        "number of tokens": model.graph.num_tokens,
        "noise": model.schedule,
        "scale_by_sigma": model.config.resolved_scale_by_sigma,
        "block length": model.block_length,
        "attention": "causal" if model.causal else "to both sides",
        "training.shift": model.config.training.shift,
    }


def _log_scores(model: ScoreModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = min(model.block_length or LONGEST, LONGEST)
    shape = (len(TIMES), length)
    clean_BL = torch.randint(model.graph.num_tokens, shape, generator=generator)
    sigma_B = model.schedule.sigma(torch.tensor(TIMES, dtype=torch.float64))
    if model.causal and model.config.training.shift:  # nor is a mask's score in any loss
        return model.log_score(clean_BL, sigma_B.float())[..., : model.graph.num_tokens]
    move, token = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    noisy_BL = model.graph.corrupt(clean_BL, sigma_B, move, token)
    return model.log_score(noisy_BL, sigma_B.float())
