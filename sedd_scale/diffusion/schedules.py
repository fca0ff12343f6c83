"""Noise schedules: how much total noise sigma(t) a token has met at time t in [0, 1].

A schedule is one curve. Either the move probability m(t) = 1 - e^(-sigma(t)) is given, with its
slope m'(t) (`MoveCurve`), or the total noise sigma(t) is, with its slope (`NoiseCurve`); everything
else follows:

    sigma = -log1p(-m)    rate g = m' / (1 - m)    g / (e^sigma - 1) = m' / m

The arithmetic is float64 whatever the dtype of t, and the answer comes back in the dtype of t.
Source: arXiv 2310.16834, section 3.3 and appendix C; arXiv 2406.07524, appendix E, for cosine and
linear.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sedd_scale.config import Config
from sedd_scale.errors import ConfigError


class Schedule(ABC):
    """Noise over time; all methods map a float tensor to one of its shape and dtype."""

    name: ClassVar[str]

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise sigma(t) in nats: a token is still untouched with probability e^(-sigma)."""
        return self._sigma(t.double()).to(t.dtype)

    def rate(self, t: Tensor) -> Tensor:
        """Rate of noise g(t) = d sigma / dt."""
        return self._rate(t.double()).to(t.dtype)

    def move_probability(self, t: Tensor) -> Tensor:
        """Probability m(t) = 1 - e^(-sigma) that the noise has touched a token by time t."""
        return self._move(t.double()).to(t.dtype)

    def rate_over_expm1(self, t: Tensor) -> Tensor:
        """Weight g / (e^sigma - 1) = m'(t) / m(t) of the absorbing loss, without cancellation."""
        return self._log_slope(t.double()).to(t.dtype)

    def time_of_move_probability(self, m: Tensor) -> Tensor:
        """Time t at which the move probability is m; the nearest end where m is out of range."""
        return self._time(m.double()).clamp(0.0, 1.0).to(m.dtype)

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _rate(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _move(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_slope(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _time(self, m: Tensor) -> Tensor: ...


class MoveCurve(Schedule):
    """A schedule given by m(t): a subclass writes it, m', m'/m and the inverse `_time`."""

    @abstractmethod
    def _slope(self, t: Tensor) -> Tensor: ...

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-self._move(t))

    def _rate(self, t: Tensor) -> Tensor:
        return self._slope(t) / (1.0 - self._move(t))


class NoiseCurve(Schedule):
    """A schedule given by sigma(t): a subclass writes it, its slope `_rate` and its inverse."""

    @abstractmethod
    def _time_of_sigma(self, sigma: Tensor) -> Tensor: ...

    def _move(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._sigma(t))

    def _log_slope(self, t: Tensor) -> Tensor:
        return self._rate(t) / torch.expm1(self._sigma(t))

    def _time(self, m: Tensor) -> Tensor:
        return self._time_of_sigma(-torch.log1p(-m))


@dataclass(frozen=True)
class LogLinear(MoveCurve):
    """m(t) = (1 - eps) t: a constant pace; the weight of the absorbing loss is exactly 1/t."""

    eps: float = 1e-3
    name: ClassVar[str] = "loglinear"

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def _move(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * t

    def _slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1.0 - self.eps)

    def _log_slope(self, t: Tensor) -> Tensor:
        return 1.0 / t

    def _time(self, m: Tensor) -> Tensor:
        return m / (1.0 - self.eps)


@dataclass(frozen=True)
class Cosine(MoveCurve):
    """m(t) = (1 - eps)(1 - cos(pi t / 2)): fastest at t = 1 (arXiv 2406.07524, appendix E)."""

    eps: float = 1e-3
    name: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def _move(self, t: Tensor) -> Tensor:
        # 1 - cos(2v) = 2 sin(v)^2 keeps every digit near t = 0.
        return 2.0 * (1.0 - self.eps) * torch.sin(math.pi / 4 * t).square()

    def _slope(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * math.pi / 2 * torch.sin(math.pi / 2 * t)

    def _log_slope(self, t: Tensor) -> Tensor:
        return math.pi / 2 / torch.tan(math.pi / 4 * t)

    def _time(self, m: Tensor) -> Tensor:
        sine = (m / (2.0 * (1.0 - self.eps))).clamp(0.0, 1.0).sqrt()
        return 4 / math.pi * torch.asin(sine)


@dataclass(frozen=True)
class Geometric(NoiseCurve):
    """sigma(t) = sigma_min^(1-t) sigma_max^t (arXiv 2310.16834, appendix C)."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    name: ClassVar[str] = "geometric"

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"noise.sigma_min={self.sigma_min} and noise.sigma_max={self.sigma_max}: "
                "choose 0 < sigma_min < sigma_max"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1.0 - t) * self.sigma_max**t

    def _rate(self, t: Tensor) -> Tensor:
        return self._sigma(t) * self._log_ratio

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / self._log_ratio


@dataclass(frozen=True)
class Linear(NoiseCurve):
    """sigma(t) = sigma_max t: a constant rate ("linear" in arXiv 2406.07524, appendix E).

    It is not linear in m: that curve is `LogLinear`.
    """

    sigma_max: float = 20.0
    name: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_max < math.inf:
            raise ConfigError(f"noise.sigma_max={self.sigma_max}: choose a positive number")

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def _rate(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max)

    def _time_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma / self.sigma_max


def make_schedule(
    name: str, *, eps: float = 1e-3, sigma_min: float = 1e-4, sigma_max: float = 20.0
) -> Schedule:
    """Build the schedule of that name from the numbers it uses.

    `eps` serves loglinear and cosine, `sigma_min` geometric, `sigma_max` geometric and linear.
    Raises ConfigError for an unknown name or for numbers that give no schedule.
    """
    if name == LogLinear.name:
        return LogLinear(eps)
    if name == Cosine.name:
        return Cosine(eps)
    if name == Geometric.name:
        return Geometric(sigma_min, sigma_max)
    if name == Linear.name:
        return Linear(sigma_max)
    raise ConfigError(f"noise.name={name!r}: choose loglinear, geometric, cosine or linear")


def schedule_of(config: Config) -> Schedule:
    """The noise schedule a configuration names."""
    noise = config.noise
    return make_schedule(
        noise.name, eps=noise.eps, sigma_min=noise.sigma_min, sigma_max=noise.sigma_max
    )


def _check_eps(eps: float) -> None:
    if not 0.0 < eps < 1.0:
        raise ConfigError(f"noise.eps={eps}: choose a number between 0 and 1, such as 1e-3")
