"""Laws of reverse steps, from time t to an earlier time s, and exact draws from them.

Of absorb: chances that depend on the schedule alone (`ancestral_chances`), and the factors that
turn e^z of a masked position into its probability of becoming a token. `sampling.absorb_steps` and
`sampling.uniform_steps` apply them.

Sources: arXiv 2310.16834, section 4 (Euler, Tweedie tau-leaping); arXiv 2406.07524, section 3.2
(ancestral steps); arXiv 2503.00307, section 3 (remasking).
"""

import torch
from torch import Tensor

from sedd_scale.diffusion.row_law import RowLaw
from sedd_scale.diffusion.score_entropy import log_expm1


def ancestral_chances(
    move_t: Tensor, move_s: Tensor, *, remask: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Chances from t to s that a mask becomes a token, and that a token becomes the mask; float64.

    With b = min(remask (m_t - m_s), m_s / (1 - m_t), 1), a token is taken back with chance b and a
    mask leaves with chance (m_t - m_s + b (1 - m_t)) / m_t: whatever b, a position that is masked
    with probability m_t is then masked with probability m_s. Source: arXiv 2503.00307, section 3.1,
    where alpha = 1 - m.
    """
    move_t, move_s = move_t.double(), move_s.double()
    most = (move_s / (1.0 - move_t).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)
    take_back = torch.minimum(remask * (move_t - move_s), most)
    leave = ((move_t - move_s) + take_back * (1.0 - move_t)) / move_t
    return leave.clamp(max=1.0), take_back


def analytic_log_factor(sigma_t: Tensor, sigma_s: Tensor, *, law: RowLaw) -> Tensor:
    """Analytic step: a mask becomes y with probability e^(factor + z_y).

    The factor is ln expm1(sigma_t - sigma_s), less what logits lie above log-scores. Where the
    probabilities add up to more than 1, they are scaled to 1. Float64, of the shape of the noise
    levels.
    """
    return log_expm1(sigma_t.double() - sigma_s.double()) - law.log_divisor(sigma_t)


def euler_log_factor(
    step_size: float | Tensor, *, sigma: Tensor, rate: Tensor, law: RowLaw
) -> Tensor:
    """Euler step: a mask becomes y with probability e^(factor + z_y).

    The factor is ln(step_size * rate), less what logits lie above log-scores. Float64, of the shape
    of the rates.
    """
    return torch.log(rate.double() * step_size) - law.log_divisor(sigma)


def draw_categorical(
    probabilities_V: Tensor, uniform: Tensor, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Int64 states [..] drawn from non-negative rows [.., V] by inverting their cumulative sums.

    `uniform` [..] lies in [0, 1) and should be float64, as `dtype` should: single precision cuts
    the tail off and so lowers the temperature (arXiv 2409.02908). Rows need not sum to 1. A state
    of probability 0 is never drawn.
    """
    cumulative_V = probabilities_V.to(dtype).cumsum(-1)
    total = cumulative_V[..., -1:]
    # Rounding may lift u * total to total itself, past every state.
    height = torch.minimum(uniform.to(dtype).unsqueeze(-1) * total, torch.nextafter(total, -total))
    return torch.searchsorted(cumulative_V, height.contiguous(), right=True).squeeze(-1)
